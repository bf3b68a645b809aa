"""A step of training: it waits for nothing, and is the same compiled, replayed and as it is written."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree

import model.execution
import record.report
import train_split
import training.step
from benchmarks.dispatched import CountedOperations
from benchmarks.sync_audit import SyncAudit
from dataset import SourceRequest, open_source
from dataset.augment.color import count_without_waiting
from dataset.loader import Batch
from dataset.mixup import Mix
from evaluation.counts import EvaluationCounts
from method.l_mcl import LMCL
from model import BackboneRequest, build_splitnet
from model.splitnet import SplitNet
from parser_params import parse_config, resolve_config
from tests.fake_gpu import GPU, fake_gpu
from tests.processes import run_processes
from tests.spaces import SPACE
from tests.waits import needs_gpu, nothing_waits
from train_split import Trainer
from training import compiling, replay
from training.compiling import compile_modules
from training.meters import Reading
from training.optim import build_optimizer, guarded_step, parameter_groups
from training.options import OptimizerOptions
from training.replay import choose_recorder
from training.state import RunState
from utils.errors import UserError
from utils.launch import World
from utils.recording import WARM_UP
from utils.targets import Targets

AUGMENTED = ["--is_autoaugment", "1", "--erase_p", "1"]
SUPERNET = ["--method", "cream", "--arch", "cream_supernet", "--search_space", SPACE, "--sta_num", "2,2"]
SUPERNET += ["--slice", 2, "--flops_maximum", 0.2, "--meta_sta_epoch", 0, "--how_to_prob", "even"]


@pytest.fixture
def trainer_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function of flags -> a trainer before its first step; an interval has two steps."""

    def build(*flags: object, device: str = "cpu") -> Trainer:
        argv = [
            "--dataset",
            "synthetic",
            "--num_classes",
            "10",
            "--crop_size",
            "8",
            "--arch",
            "resnet20",
            "--batch_size",
            "8",
            "--seed",
            "1",
            "--print_freq",
            "2",
        ]
        argv += ["--model_dir", str(tmp_path), *map(str, flags)]
        if device == "cpu":
            monkeypatch.setattr(torch, "bincount", count_without_waiting)  # as on a GPU
        with unset_fake_temporarily():
            config = parse_config(argv, program="train_split.py")
            request = SourceRequest(dataset=config.dataset, root=tmp_path, num_classes=config.num_classes, crop_size=8)
            source = open_source(request)
            config = resolve_config(config, data_recipe=source.recipe, crop_size=source.crop_size)
        trainer = Trainer(config, World(0, 1, 0, 1, torch.device(device)), source, None)
        trainer.method.train()
        return trainer

    return build


def steps(trainer: Trainer, batches: Iterator[Batch], count: int = 2) -> None:
    """Make so many steps, as the trainer's loop does."""
    for batch in itertools.islice(batches, count):
        trainer.advance(batch, trainer.training_step(batch, trainer.progress(batch)))


ROWS = {
    "s1": [*AUGMENTED, "--split_factor", 1, "--amp_dtype", "fp32"],
    "everything": [
        *AUGMENTED,
        "--split_factor",
        2,
        "--ema_decay",
        0.9,
        "--clip_grad",
        1,
        "--iters_to_accumulate",
        2,
        "--on_nonfinite",
        "skip",
        "--is_ensembled_loss",
        1,
        "--amp_dtype",
        "bf16",
    ],
    "s4": ["--split_factor", 4, "--is_mixup", 0, "--optimizer", "AdamW"],
    "randaa": ["--split_factor", 2, "--randaa", "rand-m9-n2-mstd0.5", "--optimizer", "RMSpropTF"],
    "cutmix": ["--split_factor", 2, "--is_mixup", 0, "--cutmix_alpha", 1, "--class_loss", "bce"],
    "dml": ["--method", "dml", "--split_factor", 2],
    "dks": ["--method", "dks", "--arch", "resnet20_cifar"],
    "l_mcl": ["--method", "l_mcl", "--arch", "lmcl_resnet20_cifar", "--meta_freq", 3],
    "l_mcl_bank": ["--method", "l_mcl", "--arch", "lmcl_resnet20_cifar", "--contrast", "bank", "--neg_k", 16],
}


@pytest.mark.parametrize("flags", ROWS.values(), ids=ROWS)
def test_a_step_waits_for_nothing(trainer_of, flags):
    trainer = trainer_of(*flags)
    batches = trainer.loader.epoch(0)
    steps(trainer, batches)
    with SyncAudit(trainer.world.device) as audit:
        steps(trainer, batches)
    assert trainer.position.step == 4
    assert audit.found == []


ON_A_GPU = {
    **ROWS,
    "fp16": ["--split_factor", 2, "--amp_dtype", "fp16"],
    "shake": ["--arch", "shake_resnet26_2x96d", "--split_factor", 2],
    "efficientnet": ["--arch", "efficientnetb0", "--split_factor", 2],
}
del ON_A_GPU["l_mcl_bank"]  # its preparation reads counts of labels, once in a run


@pytest.mark.parametrize("flags", ON_A_GPU.values(), ids=ON_A_GPU)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU, which other tests use, refuses mixtures itself")
@pytest.mark.filterwarnings("ignore:.*CUDA is not available", "ignore:Accessing the data pointer")
def test_a_step_on_a_gpu_mixes_no_devices(trainer_of, monkeypatch, flags):
    if "--optimizer" not in flags:
        flags = [*flags, "--optimizer", "AdamW"]  # torch's fused SGD has no fake form
    monkeypatch.setattr(LMCL, "after_step", lambda *step: None)  # differentiates twice
    with fake_gpu(monkeypatch, num_classes=10):
        trainer = trainer_of(*flags, device="cuda:0")
        batches = trainer.loader.epoch(0)
        steps(trainer, batches)
        steps(trainer, batches)
        assert {tensor.device for tensor in trainer.method.state_dict().values()} == {GPU}
        # and on the GPU alone
        assert {split.images.device for split in (trainer.source.train, trainer.source.test)} == {GPU}
    assert trainer.position.step == 4


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_mixup_knows_every_processs_images(trainer_of, monkeypatch, policy):
    found = []
    real = training.step.apply_mix
    monkeypatch.setattr(training.step, "apply_mix", lambda *a: (found.append(a[3]), real(*a))[1])
    trainer = trainer_of("--split_factor", 1, "--on_bad_image", policy)
    steps(trainer, trainer.loader.epoch(0))
    assert found == [[8]] * 2


UNTOUCHED = ["--is_autoaugment", 0, "--is_cutout", 0, "--padding", 0]  # views are the images, or their mirror images


class Mixed(NamedTuple):
    """What a step was given, and what was made of it."""

    views_in: Tensor
    views: Tensor
    targets: Targets


def mixed_steps(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, count: int) -> list[Mixed]:
    """Make so many steps, and look at what mixing does in each."""
    found: list[Mixed] = []
    mixed = trainer.training_step._mixed
    monkeypatch.setattr(
        trainer.training_step, "_mixed", lambda views, *a: (found.append(Mixed(views, *(m := mixed(views, *a)))), m)[1]
    )
    for epoch in range(count // 2):
        steps(trainer, trainer.loader.epoch(epoch))
    return found


def test_cutmix_gives_boxes_to_all_views_and_the_weights_to_the_labels(trainer_of, monkeypatch):
    for one in mixed_steps(trainer_of(*ROWS["cutmix"], *UNTOUCHED), monkeypatch, 6):
        taken_SBHW = (one.views != one.views_in).any(dim=2)
        # a box is one rectangle, the same in every view, and λ the part that lies outside of it
        box_HW = taken_SBHW.flatten(0, 1).any(dim=0)
        rows, columns = box_HW.any(dim=1), box_HW.any(dim=0)
        assert torch.equal(box_HW, rows[:, None] & columns[None, :])
        assert float(one.targets.lam) == pytest.approx(1 - float(box_HW.float().mean()))
        assert all(torch.equal(taken_BHW.any(dim=0), box_HW) for taken_BHW in taken_SBHW)


@pytest.mark.parametrize(("probability", "expected"), [(0, {None}), (1, {True}), (0.5, {None, True})])
def test_a_step_is_cutmix_or_mixup(trainer_of, monkeypatch, probability, expected):
    mixes: list[Mix] = []
    real = training.step.apply_mix
    monkeypatch.setattr(training.step, "apply_mix", lambda *a: (mixes.append(a[2]), real(*a))[1])
    trainer = trainer_of("--cutmix_alpha", 1, "--mix_switch_prob", probability, "--split_factor", 1)
    for epoch in range(4):
        steps(trainer, trainer.loader.epoch(epoch))
    assert {mix.box and True for mix in mixes} == expected


def test_a_search_reads_the_two_numbers_that_decide_what_comes_next(trainer_of):
    trainer = trainer_of(*SUPERNET)
    found = []
    for epoch in (0, 1):
        trainer.position.epoch, batches = epoch, trainer.loader.epoch(epoch)
        steps(trainer, batches)
        with SyncAudit(trainer.world.device) as audit:
            steps(trainer, batches)
        found.append([line.split(" at ")[0] for line in audit.found])
    while_closed, while_open = found
    assert while_closed == []
    # per step: the teacher, from the scores of the board; and the path's accuracy
    assert while_open == 2 * ["tolist", "tolist"]


def test_an_evaluation_reads_nothing_but_its_figures(trainer_of):
    found = []
    for batch_size in (16, 300):
        trainer = trainer_of("--eval_batch_size", batch_size, "--split_factor", 2)
        trainer.method.eval()
        with SyncAudit(trainer.world.device) as audit:
            trainer.evaluate_split("test")
        found.append(audit.found)
    many_batches, one_batch = found
    assert many_batches == one_batch


@pytest.mark.parametrize("flags", [["--amp_dtype", "fp16"], ["--ema_decay", 0.9, "--execution", "stacked"]])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU, which other tests use, refuses mixtures itself")
@pytest.mark.filterwarnings("ignore:.*CUDA is not available", "ignore:Accessing the data pointer")
def test_an_evaluation_on_a_gpu_mixes_no_devices_up_to_its_figures(trainer_of, monkeypatch, flags):
    places: list[set[torch.device]] = []

    def result(counts: EvaluationCounts) -> None:
        places.append({tensor.device for tensor in counts.tensors()})
        raise ZeroDivisionError  # the figures are read from here on, and there are none

    monkeypatch.setattr(EvaluationCounts, "result", result)
    with fake_gpu(monkeypatch, num_classes=10):
        trainer = trainer_of("--split_factor", 2, "--optimizer", "AdamW", *flags, device="cuda:0")
        trainer.method.eval()
        with pytest.raises(ZeroDivisionError):
            trainer.evaluate_split("test")
    assert places == [{GPU}]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", ROWS.values(), ids=ROWS)
def test_a_gpu_is_not_waited_for_either(trainer_of, flags):
    trainer = trainer_of(*flags, device="cuda")
    batches = trainer.loader.epoch(0)
    steps(trainer, batches)
    with nothing_waits():
        steps(trainer, batches)


def test_what_a_gpu_still_has_to_do_when_it_is_asked_is_time_of_the_steps(trainer_of, monkeypatch):
    """Steps are handed over in no time and take a second each, which passes where the host waits for a value."""
    now, owed = [0.0], [0.0]

    def wait(*_: object) -> None:
        now[0] += owed[0]
        owed[0] = 0.0

    def waiting(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (wait(), function(*args, **kwargs))[1]

    monkeypatch.setattr(record.report, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train_split, "wait_for", wait)
    monkeypatch.setattr(Reading, "is_here", waiting(Reading.is_here))
    monkeypatch.setattr(RunState, "gather", waiting(RunState.gather))
    trainer = trainer_of("--split_factor", 1, "--max_steps", 7, "--save_steps", 3)
    lines = []
    monkeypatch.setattr(trainer.report, "interval", lambda **line: lines.append(line["speed"]["images_per_second"]))
    step = trainer.training_step

    def enqueue(*args: Any) -> Any:
        owed[0] += 1.0
        return step(*args)

    trainer.training_step = enqueue
    enqueue.make_views, enqueue.update = step.make_views, step.update
    trainer.train_epoch()
    trainer.saver.close()
    assert (trainer.clock.seconds, trainer.clock.train_seconds, now[0]) == (7, 7, 7)
    assert lines == [8, 8, 8, 8]  # images a second


class LateFetched:
    """As `Fetched` of a GPU: what is asked for last is not here, and is only waited for where there is no other way."""

    on_their_way: ClassVar[list["LateFetched"]] = []

    def __init__(self, value: Tensor) -> None:
        self.value = value.clone()
        LateFetched.on_their_way.append(self)

    def is_here(self) -> bool:
        return self not in LateFetched.on_their_way[-3:]  # the meter's and the guard's

    def get(self) -> Tensor:
        return self.value


def test_a_gpu_has_its_next_steps_before_a_line_is_written(trainer_of, monkeypatch):
    """The lines are those of a CPU, one interval later but for the last and what a checkpoint must know."""
    written: dict[str, list[Any]] = {}
    for device in ("cpu", "late"):
        trainer = trainer_of("--split_factor", 1, "--max_steps", 6, "--save_steps", 5)
        if device == "late":
            monkeypatch.setattr("training.meters.Fetched", LateFetched)
            monkeypatch.setattr("training.guard.Fetched", LateFetched)
            on_gpu: Any = replace(trainer.world, device=SimpleNamespace(type="cuda"))
            monkeypatch.setattr(trainer.intervals, "world", on_gpu)
            monkeypatch.setattr(trainer, "asked_to_stop", lambda: False)
        lines = written[device] = []

        def note(trainer: Trainer = trainer, lines: list[Any] = lines, **line: Any) -> None:
            lines.append((trainer.position.done, {key: item for key, item in line.items() if key != "speed"}))

        monkeypatch.setattr(trainer.report, "interval", note)
        monkeypatch.setattr(RunState, "gather", lambda state, lines=lines: lines.append("checkpoint"))
        trainer.train_epoch()
        trainer.saver.close()
    assert [line if line == "checkpoint" else line[0] for line in written["cpu"]] == [2, 4, "checkpoint", 6]
    assert [line if line == "checkpoint" else line[0] for line in written["late"]] == [4, 5, "checkpoint", 6]
    in_order = [[line[1] for line in lines if line != "checkpoint"] for lines in written.values()]
    assert in_order[0] == in_order[1]


def test_a_line_that_is_here_is_written_before_the_next_one_is_due(trainer_of, monkeypatch):
    trainer = trainer_of("--split_factor", 1)
    here = [False]
    monkeypatch.setattr("training.meters.Reading.is_here", lambda reading: here[0])
    lines: list[int] = []
    monkeypatch.setattr(trainer.report, "interval", lambda **line: lines.append(line["step"]))
    batches = trainer.loader.epoch(0)
    steps(trainer, batches)
    trainer.intervals.end(trainer.progress(next(batches)), trainer.position.done)
    trainer.intervals.report(all_of_them=False)
    assert lines == []
    here[0] = True
    trainer.intervals.report(all_of_them=False)
    assert lines == [1]


def test_a_gpu_evaluates_small_images_by_the_thousand_unless_told_otherwise():
    argv = ["--dataset", "digits", "--arch", "resnet20"]
    config = resolve_config(parse_config(argv), data_recipe="digits")
    told = resolve_config(parse_config([*argv, "--eval_batch_size", "100"]), data_recipe="digits")
    published = resolve_config(parse_config(["--dataset", "imagenet", "--arch", "cream_14"]), data_recipe="imagenet")
    sizes = [
        [
            one.evaluation_batch(in_memory=in_memory, on_gpu=on_gpu)
            for in_memory in (True, False)
            for on_gpu in (True, False)
        ]
        for one in (config, told, published)
    ]
    assert sizes == [[1000, 100, 100, 100], [100] * 4, [512] * 4]


def test_an_update_by_rmsprop_is_few_operations_beside_the_passes():
    """Of the network whose recipe takes it. A fused update by SGD is one, so a step has at most 1.3 times as many."""
    request = BackboneRequest(arch="efficientnetb0", num_classes=10, crop_size=32, split_factor=2)
    with torch.device("meta"):
        network = build_splitnet(request, seed=0)
    options = OptimizerOptions(optimizer="RMSpropTF")
    optimizer = build_optimizer(options, parameter_groups(network, network.named_parameters(), options))
    with CountedOperations() as passes:
        network(torch.empty(2, 2, 3, 32, 32, device="meta")).sum().backward()
    for _ in range(2):
        with CountedOperations() as update:
            guarded_step(optimizer, torch.zeros((), device="meta"))
    assert sum(update.calls.values()) <= 0.3 * sum(passes.calls.values())


@needs_gpu
def test_an_evaluation_on_a_gpu_waits_for_its_figures_only(trainer_of, monkeypatch):
    trainer = trainer_of("--eval_batch_size", 16, "--split_factor", 2, device="cuda")
    trainer.method.eval()
    trainer.evaluate_split("test")
    real = EvaluationCounts.result

    def result(counts: EvaluationCounts, *args: Any, **more: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")  # the counts are read here
        return real(counts, *args, **more)

    monkeypatch.setattr(EvaluationCounts, "result", result)
    with nothing_waits():
        trainer.evaluate_split("test")


@needs_gpu
def test_a_gpu_without_room_for_the_images_trains_the_same(trainer_of, monkeypatch):
    """They come batch by batch from pinned memory then."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    flags = [*AUGMENTED, "--split_factor", 2, "--amp_dtype", "fp64"]
    expected = trained(trainer_of(*flags, device="cuda"))
    monkeypatch.setattr("dataset.loader.DEVICE_SHARE", 0.0)
    assert_close(trained(trainer_of(*flags, device="cuda")), expected, 0)


@needs_gpu
def test_an_overflow_in_fp16_is_skipped_and_the_scale_falls(trainer_of):
    trainer = trainer_of("--split_factor", 2, "--amp_dtype", "fp16", device="cuda")
    batches = trainer.loader.epoch(0)
    steps(trainer, batches)
    scaler = trainer.training_step.update.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})  # more than half precision holds
    before = {name: p.detach().clone() for name, p in trainer.method.named_parameters()}
    steps(trainer, batches, 1)
    assert all(torch.equal(p, before[name]) for name, p in trainer.method.named_parameters())
    assert scaler.get_scale() == 2.0**39
    scaler.load_state_dict({**scaler.state_dict(), "scale": 1024.0})
    steps(trainer, batches, 1)
    assert not all(torch.equal(p, before[name]) for name, p in trainer.method.named_parameters())
    assert trainer.guard.count() == 0  # by design, and no fault of the run


# ---- compiled --------------------------------------------------------------------------------------------------------


def trained(trainer: Trainer, *, epochs: int = 1, intervals: int = 3) -> dict[str, torch.Tensor]:
    """Train so many intervals of each epoch; the networks' state, on the CPU."""
    for epoch in range(epochs):
        trainer.position.epoch, trainer.position.batch = epoch, 0
        batches = trainer.loader.epoch(epoch)
        for _ in range(intervals):
            steps(trainer, batches)
    return {name: value.cpu().clone() for name, value in trainer.method.state_dict().items()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["co_training", "dks"])
def test_compiled_training_is_the_same(trainer_of, method):
    flags = ["--amp_dtype", "fp64", "--method", method, "--is_mixup", 0]
    flags += ["--arch", "resnet20_cifar"] if method == "dks" else ["--arch", "resnet20", "--split_factor", 2]
    expected = trained(trainer_of(*flags), intervals=1)
    counters = torch._dynamo.utils.counters
    counters.clear()
    trainer = trainer_of(*flags, "--compile", "aot_eager")
    assert_close(trained(trainer, intervals=1), expected, 1e-9)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1  # alike networks share what was compiled
    trainer.method.eval()
    trainer.evaluate_split("test")
    assert counters["stats"]["unique_graphs"] == 1


@needs_gpu
@pytest.mark.parametrize("execution", ["loop", "parallel"])
def test_compiled_training_is_the_same_on_a_gpu(trainer_of, monkeypatch, execution):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    flags = ["--amp_dtype", "fp64", "--is_mixup", 0, "--split_factor", 2]
    expected = trained(trainer_of(*flags, device="cuda"), intervals=1)
    torch._dynamo.reset()
    found = trained(trainer_of(*flags, "--compile", "default", "--execution", execution, device="cuda"), intervals=1)
    assert_close(found, expected, 1e-9)


@pytest.mark.slow
@torch._inductor.config.patch(compile_threads=1)  # no pool of processes for one small network
def test_inductor_computes_the_same():

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))

    eager, compiled = network(), network()
    try:
        compile_modules([compiled], "default", torch.device("cpu"))
    except UserError as error:
        pytest.skip(str(error))
    images_BCHW = torch.randn(4, 3, 8, 8)
    for one in (eager, compiled):
        one(images_BCHW).square().sum().backward()
    gradients = ({name: p.grad for name, p in one.named_parameters()} for one in (compiled, eager))
    assert_close(*gradients, 1e-5)
    assert compiled.state_dict().keys() == eager.state_dict().keys()


class _InTurns:
    """Stands for the streams of a GPU."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.networks = networks

    def __call__(self, views_SBCHW: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [network(views_BCHW) for network, views_BCHW in zip(self.networks, views_SBCHW, strict=True)]
        )


def test_a_parallel_network_is_compiled_once_for_its_batch(monkeypatch):
    """Neither for the few images of the trial, nor, after them, for any number of images; a last batch has its own."""
    batches: list[Any] = []

    def counting(graph: Any, inputs: Sequence[Any]) -> Any:
        sizes = [value.shape[0] for value in inputs if isinstance(value, torch.Tensor) and value.dim() == 4]
        # a graph for any number of images takes that number too
        batches.append("any" if any(isinstance(value, torch.SymInt) for value in inputs) else sizes[0])
        return graph.forward

    plain = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **how: plain(module, **{**how, "backend": counting}, fullgraph=True)
    )
    monkeypatch.setattr(model.execution, "Threads", _InTurns)
    torch._dynamo.reset()
    network = SplitNet([nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2)])
    network.execution = "parallel"
    compile_modules(network.models, "aot_eager", torch.device("cuda"), "parallel")
    for size in (8, 8, 5, 8):
        network(torch.randn(2, size, 3, 2, 2)).sum().backward()
    assert network.execution == "parallel"
    assert batches == [8, 5]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (SUPERNET, "--compile: this --method"),
        (
            ["--method", "l_mcl", "--arch", "lmcl_resnet20_cifar"],
            "--compile cannot go with --method l_mcl",
        ),
        (["--split_factor", 2, "--execution", "stacked"], "--compile does not go with --execution stacked"),
    ],
)
def test_what_cannot_be_compiled_is_refused(trainer_of, flags, line):
    with pytest.raises(UserError, match=line):
        trainer_of(*flags, "--compile", "aot_eager")


def graphs_under_ddp(rank: int, world_size: int) -> int:
    """How many graphs the compiler is given for one module in DDP, whose gradients fill several of its buckets."""
    module = nn.Sequential(*(nn.Linear(600, 600) for _ in range(6)))  # 1.4 MB each
    compile_modules([module], "aot_eager", torch.device("cpu"))
    counters = torch._dynamo.utils.counters
    counters.clear()
    nn.parallel.DistributedDataParallel(nn.Sequential(module), bucket_cap_mb=1)(torch.randn(2, 600)).sum().backward()
    return counters["aot_autograd"]["total"]


@pytest.mark.slow
def test_several_processes_compile_a_network_as_one_graph(tmp_path):
    assert run_processes(1, graphs_under_ddp, tmp_path / "r") == [1]


def test_what_triton_needs_on_a_gpu_is_asked_for_before_it_is_needed(monkeypatch, tmp_path):
    gpu, network = torch.device("cuda"), nn.Linear(2, 2)
    monkeypatch.setattr(network, "compile", lambda **_: None)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiling.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UserError, match="--compile default needs a C compiler such as gcc"):
        compile_modules([network], "default", gpu)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name if name == "gcc" else None)
    with pytest.raises(UserError, match=f"needs Python's headers .{tmp_path}/Python.h; .* on a GPU; install it"):
        compile_modules([network], "default", gpu)
    (tmp_path / "Python.h").touch()
    compile_modules([network], "default", gpu)
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package triton on a GPU"):
        compile_modules([network], "default", gpu)
    compile_modules([network], "aot_eager", gpu)


# ---- replayed --------------------------------------------------------------------------------------------------------


class Rerun:
    """A recorder for CPUs: what was recorded is a call, so a number that Python held then is still the same later."""

    def __init__(self, trainer: Callable[[], Trainer]) -> None:
        self.trainer, self.recorded, self.replays = trainer, 0, 0

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        before = [(tensor, tensor.clone()) for tensor in state_of(self.trainer())]
        result = function()
        for tensor, value in before:
            tensor.detach().copy_(value)
        self.recorded += 1

        def replay() -> None:
            self.replays += 1
            again = function()
            for old, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(again), strict=True):
                old.copy_(new)

        return result, replay


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    """Every tensor that a step changes."""
    tensors = [*trainer.method.parameters(), *trainer.method.buffers()]
    tensors += [v for state in trainer.state.optimizer.state.values() for v in state.values()]
    tensors += trainer.guard.tensors()
    return [*tensors, *trainer.average.state_dict().values()]


@pytest.mark.parametrize(("optimizer", "precision"), [("SGD", "fp32"), ("AdamW", "fp32"), ("SGD", "bf16")])
def test_a_replayed_step_is_the_step(trainer_of, monkeypatch, optimizer, precision):
    """In bf16 with copies of the weights, where the step as it is written casts them."""
    flags = [*AUGMENTED, "--split_factor", 2, "--ema_decay", 0.9, "--clip_grad", 1, "--on_nonfinite", "skip"]
    flags += ["--optimizer", optimizer, "--lr_mode", "epoch_cos", "--amp_dtype", precision, "--lr", 0.01]
    flags += ["--cot_weight_warm_up_epochs", 3, "--decay_epochs", 5]
    monkeypatch.setattr(replay, "check_replayable", lambda **_: None)
    monkeypatch.setattr(replay, "CudaRecorder", lambda _: Rerun(lambda: trainer))
    plain, trainer = (trainer_of(*flags, "--cuda_graph", 1) for _ in range(2))
    assert (trainer.training_step.copies is not None) == (precision == "bf16")
    plain.training_step.replayed = plain.training_step.copies = None
    plain_state = trained(plain, epochs=3)
    assert_close(trained(trainer, epochs=3), plain_state, 0)
    assert_close(trainer.average.state_dict(), plain.average.state_dict(), 0)
    assert trainer.meter.read() == plain.meter.read()
    recorder = trainer.training_step.replayed.recorder
    assert (recorder.recorded, recorder.replays) == (1, 18 - WARM_UP)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [ROWS["s1"], ROWS["s4"], ROWS["randaa"], ROWS["dml"], ROWS["dks"]])
@pytest.mark.parametrize("execution", ["loop", "parallel", "stacked"])
def test_a_cuda_graph_is_the_step(trainer_of, monkeypatch, flags, execution):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    flags = [*flags, "--amp_dtype", "fp64", "--lr", 0.01, "--execution", execution, "--cuda_graph", 1]
    # the same optimiser for both: with a graph, learning rates lie on the GPU in float32
    plain, replayed = (trainer_of(*flags, device="cuda") for _ in range(2))
    plain.training_step.replayed = None
    assert_close(trained(replayed, epochs=2), trained(plain, epochs=2), 0)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "--cuda_graph 1 needs a GPU"),
    ],
)
def test_what_cannot_be_replayed_is_refused(trainer_of, flags, line):
    with pytest.raises(UserError, match=line):
        trainer_of(*flags, "--cuda_graph", 1)


@pytest.mark.parametrize(
    ("asked", "change", "before", "is_replayed", "line"),
    [
        ("auto", {}, None, True, "auto: steps are replayed as one CUDA graph."),
        ("auto", {}, False, False, "auto: steps are not replayed, as the run before did."),
        ("auto", {}, True, True, "auto: steps are replayed as one CUDA graph, as the run before did."),
        (
            "auto",
            {"world_size": 2},
            True,
            False,
            "auto: steps are not replayed. --cuda_graph 1 is for a single process",
        ),
        ("auto", {"why": "it cannot"}, None, False, "auto: steps are not replayed. --cuda_graph cannot go with"),
        ("auto", {"device": "cpu"}, None, False, "auto: steps are not replayed. --cuda_graph 1 needs a GPU"),
        ("0", {}, None, False, "0: steps are not replayed; with auto, or 1, they would be"),
        ("0", {"scaler": True}, None, False, "0: steps are not replayed. --cuda_graph 1 does not go with fp16"),
        ("0", {"device": "cpu"}, None, False, ""),
        ("1", {}, False, True, ""),
    ],
)
def test_a_line_says_whether_steps_are_replayed(monkeypatch, caplog, asked, change, before, is_replayed, line):
    monkeypatch.setattr(replay, "CudaRecorder", lambda device: device)
    why, device = change.get("why"), torch.device(change.get("device", "cuda"))
    method: Any = SimpleNamespace(decides_on_host=False, incompatible={} if why is None else {"cuda_graph": why})
    with caplog.at_level("INFO"):
        recorder = choose_recorder(
            asked,
            method,
            name="some",
            has_exchange=False,
            iters_to_accumulate=1,
            scaler=change.get("scaler", False),
            world=World(0, change.get("world_size", 1), 0, 1, device),
            before=before,
        )
    assert (recorder is not None) == is_replayed
    assert len(caplog.messages) == bool(line)
    assert all(found.startswith(f"--cuda_graph {line}") for found in caplog.messages)
