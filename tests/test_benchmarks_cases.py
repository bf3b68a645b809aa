"""The runner's subjects at their smallest, and the published side: it must do the work that it stands for."""

import itertools
import json
import os
import sys
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import benchmarks.__main__ as runner
from benchmarks import baseline, convolutions, epoch, inference, own, step, views
from benchmarks.__main__ import SUBJECTS, build_parser, main
from benchmarks.counts import count_operations
from benchmarks.views import _spec
from dataset.augment.policy import AUTOAUGMENT_POLICIES, AutoAugment, Op, Resample
from model import BackboneRequest, build_splitnet
from model.splitnet import SplitNet
from parser_params import parse_config
from tests.test_dataset_augment import pil_op
from utils.macs import count_macs

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--split_factor", "2", "--rounds", "2"]


def rows_of(capsys, tmp_path, *argv):
    """JSON rows and printed text of a run that succeeds; by its clock, whatever is timed takes a second."""
    path = tmp_path / "rows.json"
    assert main([*argv, *SMALL, "--json", str(path)], clock=itertools.count().__next__) == 0
    return json.loads(path.read_text()), capsys.readouterr().out


def test_step_has_a_row_for_every_case_beside_the_published_step(capsys, tmp_path):
    argv = ["step", "--arch", "resnet20", "--batch_size", "4", "--cases", "fp32+loop,bf16+loop"]
    rows, text = rows_of(capsys, tmp_path, *argv)
    assert [(one["case"], one["dtype"], one["baseline_dtype"], one["goal"]) for one in rows] == [
        ("fp32+loop", "float32", "float32", None),  # no goal: not the batch that the goals name
        ("bf16+loop", "bfloat16", "float32", None),
    ]
    assert all(one["ratio_min"] == one["ratio"] == one["ratio_max"] == one["seconds"] == 1 for one in rows)
    assert {one["rounds"] for one in rows} == {2}
    assert (
        "| – | training step of resnet20 S=2, batch 4 | fp32+loop, float32 NHWC | published step, float32 NCHW |"
        in text
    )


def test_views_and_evaluation_write_rows_of_their_goals(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(views, "BATCHES", ((8, "few"), (16, "many")))
    monkeypatch.setattr(views, "SAMPLE", 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    rows, _ = rows_of(capsys, tmp_path, "views")
    assert {(one["goal"], one["commit"]) for one in rows} == {("G5", 8)}
    # no goal: not the images, or not the cores, that it names
    rows, _ = rows_of(capsys, tmp_path, "views", "--image_size", "8")
    assert {(one["goal"], one.get("commit")) for one in rows} == {(None, None)}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rows, _ = rows_of(capsys, tmp_path, "views")
    assert {(one["goal"], one.get("commit")) for one in rows} == {(None, None)}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    files = tmp_path / "photos"
    files.mkdir()
    for i in range(3):
        Image.fromarray(np.full((70, 80, 3), 40 * i, dtype=np.uint8)).save(files / f"{i}.jpg")
    rows, _ = rows_of(capsys, tmp_path, "views", "--data", str(files))
    assert [(one["goal"], one["subject"], one.get("commit")) for one in rows] == [
        ("large images", "80x70 px files to 70 px, S=1", None),
        ("large images", "80x70 px files to 70 px, S=2", 1.6),
    ]
    argv = ["epoch", "--evaluation_only", "--images", "20", "--arch", "resnet20", "--workers", "0"]
    rows, _ = rows_of(capsys, tmp_path, *argv, "--cases", "fp32+loop")
    assert rows[0]["subject"] == "evaluation of resnet20 S=2, 20 images"


def test_a_loader_of_pillow_uses_all_its_workers_and_starts_them_once(monkeypatch):
    workers, marks = 2, []
    monkeypatch.setattr(views, "VIEWS", 4)
    # every view is its worker's number and process
    monkeypatch.setattr(baseline, "pillow_views", lambda spec: _who_makes_it)
    images = [np.zeros((8, 8, 3), dtype=np.uint8)] * 3
    pillow = views._pillow_round(_spec("cifar10", 8), images, 2, workers, CPU)
    assert pillow.views == workers * views.BATCHES_PER_WORKER * 4
    for _ in range(2):
        batches = [batch for batch, _ in pillow._loader]
        assert sum(len(batch) * 2 for batch in batches) == pillow.views
        marks.append({tuple(view.tolist()) for batch in batches for view in batch.flatten(0, 1)})
    pillow.close()
    assert marks[0] == marks[1]
    assert sorted(number for number, _ in marks[0]) == [0, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Python decides")
@pytest.mark.parametrize(("workers", "method"), [(0, None), (1, "fork")])
def test_published_workers_have_the_images_without_being_sent_them(workers, method):
    """Whatever Python does by itself: from 3.14 on it starts a fork server."""
    data = baseline.PillowDataset([np.zeros((8, 8, 3), dtype=np.uint8)], [0], _who_makes_it, 1)
    context = baseline.loader(data, batch_size=1, workers=workers, device=CPU, train=True).multiprocessing_context
    assert (context and context.get_start_method()) == method


def _who_makes_it(image):
    return torch.tensor([torch.utils.data.get_worker_info().id, os.getpid()], dtype=torch.float64)


def test_a_loader_that_does_not_use_its_workers_is_none_to_beat(monkeypatch, capsys, tmp_path):
    rates = {"pillow": 90.0, "one process": 10.0}
    assert views._uses_its_workers(rates, 16)
    assert not views._uses_its_workers({**rates, "one process": 12.0}, 16)
    assert views._uses_its_workers({"pillow": 1.0}, 0)
    # by a clock that gives both sides a second, two processes make more views than one only if they make more a round
    monkeypatch.setattr(views, "BATCHES", ((8, "few"),))
    monkeypatch.setattr(views, "SAMPLE", 16)
    monkeypatch.setattr(views, "_goal", lambda options, device: ("G6", 50.0))
    for size, goal in ((16, "G6"), (2, None)):
        monkeypatch.setattr(views, "VIEWS", size)
        rows, _ = rows_of(capsys, tmp_path, "views", "--workers", "2", "--image_size", "8")
        assert [one["goal"] for one in rows] == [goal]
        assert rows[0]["pillow_per_second"] == {"pillow": 4 * size, "one process": 16}


def test_inference_stands_beside_both_large_networks(capsys, tmp_path):
    rows, _ = rows_of(capsys, tmp_path, "inference", "--arch", "resnet20", "--batch_sizes", "1", "--precision", "fp32")
    pairs = [(one["case"], one["baseline"]) for one in rows]
    assert pairs[0] == ("large, one network", "published large network")
    for strategy in ("loop", "parallel", "stacked"):
        assert (f"ensemble, {strategy}", "published large network") in pairs
        assert (f"ensemble, {strategy}", "large, one network") in pairs


def test_a_row_on_a_gpu_has_a_goal_only_with_what_the_goal_names(monkeypatch):
    gpu, parser = torch.device("cuda"), build_parser()
    for subject in (views, epoch):
        monkeypatch.setattr(subject, "allowed_cpus", lambda: 16)

    def goal(subject, *argv, **more):
        return subject._goal(parser.parse_args([subject.__name__.rpartition(".")[2], *argv]), gpu, **more)

    assert goal(step, case="bf16+loop") == ("G1", 5.0)
    assert goal(step, "--arch", "wide_resnet28_10", case="bf16+parallel+graph") == ("G2", 1.6)
    assert goal(step, case="fp32+loop") == (None, None)
    assert goal(step, "--batch_size", "64", case="bf16+loop") == (None, None)
    assert goal(epoch, "--workers", "16", images=50_000) == ("G7", 5.0)
    assert goal(epoch, "--workers", "2", images=50_000) == (None, None)
    assert goal(epoch, "--workers", "16", images=1024) == (None, None)
    assert goal(views, "--workers", "16") == ("G6", 50)
    for argv in (["--workers", "0"], ["--workers", "16", "--recipe", "svhn"]):
        assert goal(views, *argv) == (None, None)
    assert goal(inference) == "G9"
    for argv in (["--split_factor", "4"], ["--arch", "resnet20"]):
        assert goal(inference, *argv) is None


def test_ceilings_and_convolutions_at_their_smallest(capsys, tmp_path):
    rows, _ = rows_of(capsys, tmp_path, "ceilings", "--side", "16", "--copy_mib", "1")
    assert [one["unit"] for one in rows] == ["FLOP", "FLOP", "bytes", "launches"]
    rows, _ = rows_of(capsys, tmp_path, "convolutions", "--widths", "8", "--sides", "4", "--batches", "2")
    # in sequence, groups and undivided, two layouts, three passes; the baseline itself has no row
    assert len(rows) == 3 * (3 * 2 - 1)
    assert {one["baseline"] for one in rows} == {"in sequence"}


class Streams:
    """Stands for torch's streams and events: knows what lies in the past of each work."""

    def __init__(self, monkeypatch):
        self.past: dict[int, set[int]] = {}
        self.current = self.new()
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)

    def new(self):
        stream = SimpleNamespace(done=set(), device=None)
        stream.record_event = lambda: frozenset(stream.done)
        stream.wait_event = stream.done.update
        stream.wait_stream = lambda other: stream.done.update(other.done)
        return stream

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def work(self, number):
        self.past[number] = set(self.current.done)
        self.current.done.add(number)


def test_streams_of_a_graph_wait_for_what_came_before_and_not_for_each_other(monkeypatch):
    streams = Streams(monkeypatch)
    streams.work(-1)
    convolutions.side_by_side(streams.work, [streams.new() for _ in range(4)])
    streams.work(9)
    assert [streams.past[number] for number in range(4)] == [{-1}] * 4
    assert streams.past[9] == {-1, 0, 1, 2, 3}


def test_what_is_measured_before_a_failure_is_on_the_disk(capsys, tmp_path, monkeypatch):
    """And a case that fails costs no other one."""
    monkeypatch.setattr(own, "TOGETHER", 1)
    path, real = tmp_path / "rows.json", own.training_step
    written: list[list[str]] = []

    def training_step(trainer):
        written.append([one["case"] for one in json.loads(path.read_text())] if path.exists() else [])
        if len(written) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(trainer)

    monkeypatch.setattr(own, "training_step", training_step)
    argv = ["step", "--arch", "resnet20", "--batch_size", "4", "--cases", "fp32+loop,bf16+loop,fp32+stacked"]
    assert main([*argv, *SMALL, "--json", str(path)], clock=itertools.count().__next__) == 1
    assert written == [[], ["fp32+loop"], ["fp32+loop", "bf16+loop"]]
    rows = json.loads(path.read_text())
    assert [one.get("error") for one in rows] == [None, "CUDA out of memory.", None]
    assert "failed: CUDA out of memory." in capsys.readouterr().out


def test_an_epoch_has_as_many_images_as_it_is_told(capsys, tmp_path):
    argv = ["epoch", "--arch", "resnet20", "--workers", "0", "--cases", "fp32+loop", "--batch_size", "8"]
    rows, _ = rows_of(capsys, tmp_path, *argv, "--images", "16")
    assert rows[0]["subject"] == "epoch with evaluation and checkpoint of resnet20 S=2, 16 images"
    trainer = own.open_trainer(["--arch", "resnet20", "--workers", "0"], tmp_path, CPU)
    own.resize(trainer, 5000)
    assert [len(split) for split in (trainer.source.train, trainer.source.test)] == [5000, 1000]
    assert trainer.source.train.targets[:20].tolist() == 2 * list(range(10))


def test_division_stands_beside_one_network_and_the_matrix_product(capsys, tmp_path):
    argv = ["division", "--arch", "resnet20", "--batch_size", "4", "--case", "fp32+loop", "--side", "64"]
    rows, _ = rows_of(capsys, tmp_path, *argv)
    divided, *used = rows
    assert (divided["case"], divided["baseline"]) == ("S=2, fp32+loop", "S=1, fp32+loop")
    assert [one["case"] for one in used] == ["S=1, fp32+loop", "S=2, fp32+loop"]
    for one in used:  # FLOP/s of the step over FLOP/s of the product
        assert one["ratio"] == pytest.approx(one["per_second"] / (2 * 64**3))
    plain = build_splitnet(BackboneRequest(arch="resnet20", split_factor=1), seed=1)
    assert used[0]["per_second"] == pytest.approx(6 * 4 * count_macs(plain, (3, 32, 32)))


def test_counts_find_the_published_waits_and_none_of_ours(capsys, tmp_path):
    rows, text = rows_of(capsys, tmp_path, "counts", "--arch", "resnet20", "--batch_size", "4")
    published, ours = rows
    # S + 3 meters and mixup's copy
    assert published["host_waits"] == 2 + 3 + 1
    assert (ours["goal"], ours["host_waits"], ours["met"]) == ("G8", 0, True)
    assert (ours["baseline_dtype"], ours["baseline_layout"]) == ("float32", "NCHW")
    assert (ours["dtype"], ours["layout"]) == ("float32", "NHWC")
    assert ours["ratio_min"] == ours["ratio"] == ours["ratio_max"]
    assert ours["ratio"] == published["operations"] / ours["operations"]
    assert "| G8 | training step of resnet20 S=2, batch 4 | fp32+loop |" in text


def test_passes_count_what_is_dispatched_of_three_kinds(capsys, tmp_path):
    rows, _ = rows_of(capsys, tmp_path, "passes", "--networks", "resnet20:1,resnet20:2", "--case", "fp32+loop")
    one, two = rows[:3], rows[3:]
    assert [row["subject"] for row in one] == [
        f"{what} of resnet20 S=1" for what in ("training step", "evaluation batch", "inference batch")
    ]
    for few, many in zip(one, two, strict=True):
        assert few["operations"] < many["operations"] < 2 * few["operations"]
    assert one[2]["operations"] < one[1]["operations"] < one[0]["operations"]


OF_LIBRARIES = ["timm", "torchvision"]


@pytest.mark.parametrize(
    ("only", "workers", "sides", "where"),
    [
        ("memory", "0", OF_LIBRARIES, ["32x32 px in memory"]),
        pytest.param("ensemble", "0", ["plain loop"], ["32x32 px in memory"], marks=pytest.mark.slow),
        pytest.param(
            "files_64,files_500",
            "1",
            2 * OF_LIBRARIES,
            2 * ["64x64 px JPEG files"] + 2 * ["500x375 px JPEG files"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_peers_train_on_the_same_images(capsys, tmp_path, only, workers, sides, where):
    pytest.importorskip("timm")
    argv = ["peers", "--images", "8", "--batch_size", "4", "--crop_size", "32", "--workers", workers, "--only", only]
    rows, _ = rows_of(capsys, tmp_path, *argv)
    assert [row["baseline"] for row in rows] == sides
    assert all("error" not in row and row["case"] == "ours" and row["ratio"] > 0 for row in rows)
    for row, of_images in zip(rows, where if len(where) == len(rows) else len(rows) * where, strict=True):
        assert of_images in row["subject"]
        assert f"{workers} workers" in row["subject"]
        assert ("deep ensemble of 4" in row["subject"]) == (only == "ensemble")


def test_operations_are_counted_once_and_views_not_at_all():
    a, b = torch.ones(4, 4), torch.ones(4, 4)
    # a product and what follows it; nothing for the transposition
    assert count_operations(lambda: (a.t() @ b).relu()) == 2


def test_numerics_compare_with_the_first_case(capsys, tmp_path):
    argv = ["numerics", "--arch", "resnet20", "--steps", "2", "--batch_size", "4", "--cases", "fp32+loop,bf16+loop"]
    rows, _ = rows_of(capsys, tmp_path, *argv)
    assert rows[0]["weight_distance"] == 0
    assert 0 < rows[1]["weight_distance"] < 0.1


def test_a_file_that_is_no_image_is_named_by_peers(capsys, tmp_path):
    (tmp_path / "a.jpg").write_text("x")
    assert main(["peers", "--only", "memory", "--data", str(tmp_path)]) == 1
    assert f"benchmarks: {tmp_path / 'a.jpg'}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["step", "--device", "cuda:77"], "--device cuda:77"),
        (["step", "--cases", "fp32+magic"], "'magic' is none of fp32"),
        (["views", "--data", "/nowhere"], "--data /nowhere holds no image"),
        (["step", "--arch", "resnet19"], "--arch 'resnet19'"),
        (["peers", "--images", "8", "--batch_size", "16"], "--batch_size 16"),
        (["placement", "--parts", "memory,2gbit"], "--parts 2gbit"),
    ],
)
def test_mistakes_are_one_line(argv, words, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_gpu_that_is_named_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cuda:1", "cuda", "cpu"):
        runner._device(name)
    assert current == [torch.device("cuda", 1)]


@pytest.mark.parametrize(
    ("argv", "flag", "least"),
    [
        (["step", "--threads", "-1"], "--threads", 0),
        (["views", "--split_factor", "0"], "--split_factor", 1),
        (["counts", "--batch_size", "-1"], "--batch_size", 1),
        (["inference", "--batch_sizes", "1,x"], "--batch_sizes", 1),
        (["convolutions", "--widths", "8,0"], "--widths", 1),
    ],
)
def test_numbers_that_cannot_be_are_one_line_too(argv, flag, least, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"{flag}: expected a whole number from {least} on, got" in error
    assert error.count("\n") == 1


def test_every_subject_has_a_help_text():
    for name in SUBJECTS:
        with pytest.raises(SystemExit) as stopped:
            build_parser().parse_args([name, "--help"])
        assert stopped.value.code == 0


# ---- the published side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "svhn", "imagenet"])
def test_published_ops_are_those_of_the_batched_policy(name):
    """Every op of a policy table at its level, both signs, gives what the golden-tested batched table stands for."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    ours = AutoAugment(name)
    published = baseline.PillowAutoAugment(name)
    for i, (_, op1, level1, _, op2, level2) in enumerate(AUTOAUGMENT_POLICIES[name]):
        for k, (op, level) in enumerate(((op1, level1), (op2, level2))):
            value = published.levels[op][level] if op in published.levels else 0.0
            for sign, uniform in ((1, 0.9), (-1, 0.1)):
                uniforms = np.full((1, 1, 5), uniform)
                uniforms[..., 0] = (i + 0.5) / 25
                uniforms[..., 1 + 2 * k] = -1.0  # always applied
                step = ours.draw(uniforms)
                expected = pil_op(
                    image,
                    Op(int(step.ops_NVB[k, 0, 0])),
                    float(step.values_NVB[k, 0, 0]),
                    Resample(int(step.resamples_NVB[k, 0, 0])),
                    baseline.GREY,
                )
                found = published.apply(image, op, sign * value)
                assert np.array_equal(np.asarray(found), np.asarray(expected)), (op, level, sign)


def test_published_views_differ_and_are_normalised():
    spec = _spec("cifar10", 16)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    data = baseline.PillowDataset([image], [3], baseline.pillow_views(spec), 2)
    views, label = data[0]
    assert (views.shape, label) == ((2, 3, 16, 16), 3)
    assert not torch.equal(views[0], views[1])
    plain = baseline.pillow_evaluation(spec)(Image.fromarray(image))
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (spec.mean, spec.std))
    assert torch.allclose(plain, (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std, atol=1e-6)


def test_published_step_learns_and_reads_every_meter():
    torch.manual_seed(0)
    network = build_splitnet(BackboneRequest(arch="resnet20", split_factor=2), seed=0)
    step = baseline.BaselineStep(network, CPU, mix_alpha=1e-6)
    views, labels = torch.randn(1, 8, 3, 16, 16).expand(2, -1, -1, -1, -1), torch.arange(8)
    losses = []
    for _ in range(6):
        before = step.meters["loss_ce"].total
        step(views, labels)
        losses.append((step.meters["loss_ce"].total - before) / 8)
    assert losses[-1] < losses[0]
    assert step.meters["loss_cot"].count == 48
    assert [meter.count for meter in step.network_meters] == [48, 48]


def test_published_evaluation_counts_every_image():
    torch.manual_seed(0)
    network = SplitNet([torch.nn.Flatten(), torch.nn.Flatten()])
    images = torch.zeros(6, 3, 1, 1)
    images[torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 2])] = 1.0
    labels = torch.tensor([0, 1, 2, 0, 0, 0])
    accuracies, ensemble = baseline.baseline_evaluate(
        network, iter([(images[:4], labels[:4]), (images[4:], labels[4:])]), CPU
    )
    assert accuracies == pytest.approx([100 * 4 / 6] * 2)
    assert ensemble == pytest.approx(100 * 4 / 6)


def test_published_divergence_is_that_of_the_loss_package():
    from loss.agreement import js_divergence

    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    found = baseline.BaselineStep._js_divergence(list(logits))
    assert float(found) == pytest.approx(float(js_divergence(logits).mean()), rel=1e-5)


def test_cases_of_a_gpu_are_flags_of_the_parser(monkeypatch):
    monkeypatch.setattr(own, "has_fast_bf16", lambda device: True)
    for device in ("cpu", "cuda"):
        for case in own.default_cases(torch.device(device)):
            config = parse_config([*own.case_flags(case), "--dataset", "digits"], program="train_split.py")
            assert config.amp_dtype == case.split("+")[0]
            assert config.execution == case.split("+")[1]
            assert config.cuda_graph == str(int("graph" in case))
            assert (config.compile is not None) == ("compile" in case)


def test_cases_become_flags_of_the_parser():
    assert own.case_flags("bf16+loop+compile") == ["--amp_dtype", "bf16", "--compile", "default"]
    assert Counter(own.case_flags("fp32+loop"))["--amp_dtype"] == 1
