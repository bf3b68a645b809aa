"""Distillation: its losses by the golden numbers, the teacher that sleeps, sees the student's bytes, and is checked."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import eval as evaluation
import train_split
from loss.distillation import decoupled_kl, distillation_kl, joint_teacher, mixed_decoupled_kl
from method import Progress, Targets, TrainingData, methods
from method.kd import KDOptions
from model import BackboneRequest, build_splitnet, request_of
from model.backbone import timm_nets
from model.restore import published_keys
from parser_params import parse_config, resolve_config
from record.checkpoint import load_checkpoint, save_checkpoint, state_sha256
from tests.rivals import GOLDEN, assert_number, assert_record, every_precision, fill
from utils.errors import UserError

REQUEST = BackboneRequest(arch="resnet20", num_classes=10, dataset="digits", crop_size=16)
CLASSES = tuple("0123456789")
DATA = TrainingData(CLASSES, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 16)


def progress(epoch: int = 0) -> Progress:
    return Progress(epoch, 0, 0, 10, 40, 0.1, torch.arange(6))


def plain(labels: Tensor) -> Targets:
    return Targets(labels, labels, torch.tensor(1.0))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Two networks of a division by 2, as a run's checkpoint keeps them."""
    return save_teacher(tmp_path / "teacher.pth.tar")


def save_teacher(path: Path, *, split_factor: int = 2, seed: int = 7, **content: Any) -> Path:
    network = build_splitnet(replace(REQUEST, split_factor=split_factor), seed=seed)
    config = {"arch": "resnet20", "split_factor": split_factor, "dataset": "digits"}
    state = {
        "arch": "resnet20",
        "state_dict": published_keys(network.state_dict()),
        "config": config,
        "classes": list(CLASSES),
        "mean": list(DATA.mean),
        "std": list(DATA.std),
        "crop_size": 16,
    }
    save_checkpoint(state | content, path)
    return path


def make(teacher: Path, *, seed: int = 1, split_factor: int = 1, data: TrainingData = DATA, **options: Any) -> Any:
    network = build_splitnet(replace(REQUEST, split_factor=split_factor), seed=seed)
    method = methods.get("kd")(network, KDOptions(teacher=str(teacher), **options))
    method.meet(data)
    return method.train()


def step(method: Any, views: Tensor, targets: Targets, epoch: int = 0) -> Any:
    method.before_step(views, targets, progress(epoch))
    return method(views, targets, progress(epoch))


def batch(num_views: int = 1) -> tuple[Tensor, Targets]:
    torch.manual_seed(1)
    return torch.randn(num_views, 6, 3, 16, 16), plain(torch.randint(10, (6,)))


# ---- losses ----------------------------------------------------------------------------------------------------------


def with_logits(method: Any, student: Tensor, teacher: Tensor) -> Any:
    """The method with given logits in the place of what the networks say."""
    method.network.forward = lambda views: student[None]
    method.teacher.forward = lambda views: teacher.detach()[None]
    return method.to(student.dtype)


@every_precision
@pytest.mark.parametrize("row", GOLDEN["kd"]["kd"])
def test_kd_is_that_of_the_golden_file(row: dict[str, Any], dtype: torch.dtype, teacher: Path) -> None:
    student, taught = fill(row["student"], dtype), fill(row["teacher"], dtype)
    options = {"kd_ce_weight": row["ce_weight"], "kd_weight": row["kd_weight"], "kd_temperature": row["temperature"]}
    method = with_logits(make(teacher, **options), student, taught)
    output = step(method, torch.zeros(1, len(row["labels"]), 3, 4, 4), plain(torch.tensor(row["labels"])))
    assert_number(output.metrics["loss_ce"], row["loss_ce"], dtype)
    assert_number(output.metrics["loss_kd"], row["loss_kd"], dtype)
    assert_number(output.loss, row["total"], dtype)
    output.loss.backward()
    assert_record(student.grad, row["grad_student"])
    assert taught.grad is None


@every_precision
@pytest.mark.parametrize("row", GOLDEN["kd"]["dkd"])
def test_dkd_is_that_of_the_golden_file(row: dict[str, Any], dtype: torch.dtype, teacher: Path) -> None:
    student, taught = fill(row["student"], dtype), fill(row["teacher"], dtype)
    labels = torch.tensor(row["labels"])
    for name, alpha, beta in (("tckd", 1.0, 0.0), ("nckd", 0.0, 1.0)):
        part = decoupled_kl(student, taught, labels, temperature=row["temperature"], alpha=alpha, beta=beta)
        assert_number(part.mean(), row[name], dtype)
    options = {
        "kd_loss": "dkd",
        "kd_ce_weight": 1.0,
        "kd_temperature": row["temperature"],
        "dkd_alpha": row["alpha"],
        "dkd_beta": row["beta"],
        "dkd_warm_up_epochs": row["warm_up_epochs"],
    }
    method = with_logits(make(teacher, **options), student, taught)
    output = step(method, torch.zeros(1, len(labels), 3, 4, 4), plain(labels), epoch=row["epoch_counted_from_1"] - 1)
    assert_number(output.metrics["loss_dkd"], row["loss_dkd"], dtype)
    assert_number(output.loss, row["total"], dtype)
    output.loss.backward()
    assert_record(student.grad, row["grad_student"])


def test_several_networks_teach_as_the_answers_page_says() -> None:
    """Rows of golden/answers.json: four synthetic networks, both rules, α of CE and KL as weights 1 - α and α."""
    golden = json.loads((Path(__file__).parent / "golden" / "answers.json").read_text())
    for row in golden["distillation"]:
        case = golden["cases"][row["case"]]["case"]
        taught, labels = synthetic_ensemble(case, 32)
        noise = gauss(32 * case["K"], case["stream"] + 777).reshape(32, case["K"])
        student = torch.tensor(np.round(1.5 * noise, 4), requires_grad=True)
        assert student[0].tolist() == pytest.approx(row["student_first"])
        ce = torch.nn.functional.cross_entropy(student, labels)
        together = joint_teacher(taught, temperature=row["T"], rule=row["teacher"])
        kl = distillation_kl(student, together, temperature=row["T"]).mean() / row["T"] ** 2
        total = (1 - row["alpha"]) * ce + row["alpha"] * row["T"] ** 2 * kl
        assert [ce.item(), kl.item(), total.item()] == pytest.approx([row["ce"], row["kl"], row["total"]], rel=1e-6)
        total.backward()
        assert student.grad.norm().item() == pytest.approx(row["grad_norm"], rel=1e-6)


def hash32(x: np.ndarray) -> np.ndarray:
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def uniform(count: int, stream: int) -> np.ndarray:
    numbers = (np.arange(count, dtype=np.uint64) + np.uint64(stream * 1_000_000)).astype(np.uint32)
    return (hash32(numbers) + 0.5) / 2.0**32


def gauss(count: int, stream: int) -> np.ndarray:
    return (sum(uniform(count, stream + i) for i in range(4)) - 2) * np.sqrt(3)


def synthetic_ensemble(case: dict[str, Any], count: int) -> tuple[Tensor, Tensor]:
    """Logits [S, B, K] and labels [B] by the formulas of golden/answers.json."""
    K, stream = case["K"], case["stream"]
    labels = np.minimum(np.floor(uniform(count, stream) * K), K - 1).astype(np.int64)
    signal = np.zeros((count, K))
    signal[np.arange(count), labels] = case["signal"] * uniform(count, stream + 1)
    shared = case["shared"] * gauss(count * K, stream + 2).reshape(count, K)
    logits = [
        np.round(case["scale"] * (shared + own * gauss(count * K, stream + 10 + 10 * s).reshape(count, K) + signal), 4)
        for s, own in enumerate(case["own"])
    ]
    return torch.tensor(np.stack(logits)), torch.tensor(labels)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_two_parts_of_dkd_are_kd(temperature: float) -> None:
    torch.manual_seed(0)
    student, taught = 3 * torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.tensor([0, 6, 2, 2, 5])
    rest_B = 1 - (taught / temperature).softmax(dim=-1)[range(5), labels]
    found = decoupled_kl(student, taught, labels, temperature=temperature, alpha=1.0, beta=0.0)
    found += rest_B * decoupled_kl(student, taught, labels, temperature=temperature, alpha=0.0, beta=1.0)
    torch.testing.assert_close(found, distillation_kl(student, taught, temperature=temperature))


def test_enormous_logits_give_finite_losses_and_gradients() -> None:
    for size in (1200.0, 1e4):
        student = torch.tensor([[size, -size, 0.0], [-size, size, size]], requires_grad=True)
        taught = torch.tensor([[-size, size, 1.0], [size, size, -size]])
        for labels in (torch.tensor([0, 1]), torch.tensor([1, 0])):
            options = {"temperature": 1.0, "alpha": 1.0, "beta": 8.0}
            loss = decoupled_kl(student, taught, labels, **options) + distillation_kl(student, taught)
            (gradient,) = torch.autograd.grad(loss.sum(), student)
            assert loss.isfinite().all()
            assert gradient.isfinite().all()


def test_mixed_labels_mix_dkd() -> None:
    torch.manual_seed(0)
    student, taught = torch.randn(2, 4, 5)
    one, other = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 1, 0, 2])
    options = {"temperature": 2.0, "alpha": 1.0, "beta": 3.0}
    found = mixed_decoupled_kl(student, taught, Targets(one, other, torch.tensor(0.3)), **options)
    expected = 0.3 * decoupled_kl(student, taught, one, **options) + 0.7 * decoupled_kl(
        student, taught, other, **options
    )
    torch.testing.assert_close(found, expected)


# ---- the teacher -----------------------------------------------------------------------------------------------------


def test_the_teacher_sleeps_and_sees_the_bytes_of_each_student(teacher: Path) -> None:
    method = make(teacher, split_factor=2)
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    seen: list[Tensor] = []
    method.teacher.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    views, targets = batch(2)
    step(method, views, targets).loss.backward()
    assert [torch.equal(*pair) for pair in zip(seen, views, strict=True)] == [True, True]
    for name, value in method.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(p.requires_grad or p.grad is not None for p in method.teacher.parameters())
    assert not [name for name, _ in method.trained_parameters() if not name.startswith("network.")]

    seen.clear()
    step(method, views[:1], targets)
    assert len(seen) == 1  # one view for all: one pass


def test_a_teacher_that_is_the_student_teaches_nothing(tmp_path: Path) -> None:
    alone = save_teacher(tmp_path / "alone.pth.tar", split_factor=1, seed=1)
    method = make(alone, seed=1).eval()
    views, targets = batch()
    assert step(method, views, targets).metrics["loss_kd"].abs() < 1e-6


def test_another_normalisation_is_mapped(teacher: Path) -> None:
    views, _ = batch()
    as_taught = make(teacher).teach(views[0])
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.5)
    images = views[0] * 0.25 + 0.5
    own = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    other = make(teacher, data=DATA._replace(mean=mean, std=std))
    torch.testing.assert_close(other.teach(own), as_taught, rtol=1e-4, atol=1e-4)


def test_a_teacher_of_other_data_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--teacher .*class 9 is '9', and the data's is 'nine'"):
        make(teacher, data=DATA._replace(classes=(*CLASSES[:9], "nine")))
    with pytest.raises(UserError, match=r"--teacher .*images of 16 pixels, and these have 32: give --crop_size 16"):
        make(teacher, data=DATA._replace(crop_size=32))
    with pytest.raises(UserError, match=r"--teacher .*knows 10 classes, and the data has 4"):
        methods.get("kd")(build_splitnet(replace(REQUEST, num_classes=4), seed=0), KDOptions(teacher=str(teacher)))
    with pytest.raises(UserError, match=r"--teacher .*does not exist"):
        make(tmp_path / "nowhere.pth.tar")
    with pytest.raises(UserError, match=r"add --teacher PATH"):
        methods.get("kd")(build_splitnet(REQUEST, seed=0), KDOptions())


def test_the_checkpoint_knows_the_teacher_by_its_hash(teacher: Path, tmp_path: Path) -> None:
    method = make(teacher)
    state = method.training_state()
    assert state == {"teacher": str(teacher), "weights_sha256": state_sha256(method.teacher.network.state_dict())}
    moved = save_teacher(tmp_path / "moved.pth.tar")
    make(moved).load_training_state(state)
    with pytest.raises(UserError, match=r"--teacher .*holds other weights than the teacher of the run before"):
        make(save_teacher(tmp_path / "other.pth.tar", seed=8)).load_training_state(state)


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "loss", "expected"),
    [
        ("cifar100", "kd", {"kd_temperature": 4, "kd_ce_weight": 0.1, "kd_weight": 0.9, "lr": 0.05, "batch_size": 64}),
        ("cifar10", "dkd", {"kd_ce_weight": 1, "dkd_alpha": 1, "dkd_beta": 8, "dkd_warm_up_epochs": 20}),
        ("cifar10", "dkd", {"epochs": 240, "lr_milestones": (150, 180, 210), "weight_decay": 5e-4}),
        ("imagenet", "kd", {"kd_temperature": 1, "kd_ce_weight": 0.5, "kd_weight": 0.5, "lr": 0.2, "batch_size": 512}),
        ("imagenet", "dkd", {"kd_ce_weight": 1, "dkd_beta": 0.5, "dkd_warm_up_epochs": 1, "weight_decay": 1e-4}),
    ],
)
def test_defaults_are_the_published_ones(data: str, loss: str, expected: dict[str, Any]) -> None:
    config = parse_config(["--method", "kd", "--dataset", data, "--kd_loss", loss, "--teacher", "t.pth.tar"])
    values = resolve_config(config, data_recipe=data)
    found = {**values.values(), "lr_milestones": values.lr_milestones}
    assert {name: found[name] for name in expected} == expected


def test_a_student_is_one_of_the_teachers_networks(teacher: Path) -> None:
    argv = ["--method", "kd", "--dataset", "digits", "--teacher", str(teacher), "--student_of", "1"]
    config = parse_config(argv)
    assert (config.arch, config.split_factor, config.is_train_sep) == ("resnet20", 2, True)
    assert config.stage_widths == ()
    for flag in (["--arch", "resnet20"], ["--split_factor", "2"]):
        with pytest.raises(UserError, match=rf"--student_of 1 takes the teacher's own network: leave {flag[0]} away"):
            parse_config([*argv, *flag])
    with pytest.raises(UserError, match=r"--student_of 1 needs the teacher"):
        parse_config(["--method", "kd", "--student_of", "1"])


def test_a_teachers_file_cannot_make_us_run_a_program(teacher: Path, tmp_path: Path) -> None:
    ran, program = tmp_path / "ran", tmp_path / "theirs.py"
    program.write_text(f"open({str(ran)!r}, 'w')\n")
    content = load_checkpoint(teacher)
    path = tmp_path / "of_a_program.pth.tar"
    save_checkpoint({**content, "config": {**content["config"], "arch": f"{program}:tiny"}}, path)
    argv = ["--method", "kd", "--dataset", "digits", "--crop_size", "16", "--no_cuda", "--teacher", str(path)]
    said = rf"--teacher {path}: its networks come from the program .* add --teacher_arch FILE.py:FACTORY"
    with pytest.raises(UserError, match=said):
        parse_config([*argv, "--student_of", "1"])
    network = build_splitnet(BackboneRequest(arch="resnet20", num_classes=10, dataset="digits", crop_size=16), seed=0)
    with pytest.raises(UserError, match=said):
        methods.get("kd")(network, methods.get("kd").Options(teacher=str(path)))
    assert not ran.exists()


def test_a_student_has_the_widths_that_were_solved(tmp_path: Path) -> None:
    request = BackboneRequest(arch="torchvision/resnet18", split_factor=2, num_classes=10, crop_size=32)
    network = build_splitnet(request, seed=0)
    widths = request_of(network.models[0]).widths
    config = {"arch": request.arch, "split_factor": 2, "dataset": "cifar10"}
    path = tmp_path / "solved.pth.tar"
    save_checkpoint({"state_dict": network.state_dict(), "config": config, "widths": list(widths)}, path)
    config = parse_config(["--method", "kd", "--dataset", "cifar10", "--teacher", str(path), "--student_of", "1"])
    assert config.stage_widths == widths
    assert config.backbone_request(10).widths == widths


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_resumes_with_its_teacher_only_and_keeps_the_students_alone(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    run = tmp_path / "run"
    argv = ["--method", "kd", "--dataset", "digits", "--arch", "resnet20", "--crop_size", "16", "--no_cuda"]
    argv += ["--amp_dtype", "fp32", "--batch_size", "96", "--seed", "1", "--model_dir", str(run)]
    assert train_split.main([*argv, "--teacher", str(teacher), "--max_steps", "1"]) == 0
    state = load_checkpoint(run / "checkpoint_0_1.pth.tar")
    assert set(state["method"]) == {"teacher", "weights_sha256"}
    assert all(name.startswith("module.models.0.") for name in state["state_dict"])

    gone = ["--teacher", str(tmp_path / "gone.pth.tar"), "--max_steps", "2", "--resume", "auto"]
    assert train_split.main([*argv, *gone]) == 2
    assert "gone.pth.tar: does not exist" in capsys.readouterr().err
    assert train_split.main([*argv, "--teacher", str(teacher), "--max_steps", "2", "--resume", "auto"]) == 0
    capsys.readouterr()
    assert evaluation.main(["--resume", str(run / "checkpoint_0_2.pth.tar"), "--no_cuda", "--workers", "0"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["split_factor"] == 1


def test_a_student_of_a_transformer_has_the_teachers_plan_without_the_solver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logging_restored: None
) -> None:
    """Its plan is one of constructor arguments: names and numbers, here others than the solver's."""
    pytest.importorskip("timm")
    base = ["--dataset", "digits", "--crop_size", "16", "--no_cuda", "--amp_dtype", "fp32", "--batch_size", "96"]
    base += ["--workers", "0", "--seed", "1", "--val_fraction", "0.8", "--max_steps", "1"]
    split = ["--arch", "timm/test_vit", "--split_factor", "2", "--method", "independent"]
    assert train_split.main([*base, *split, "--model_dir", str(tmp_path / "teacher")]) == 0
    plan = load_checkpoint(tmp_path / "teacher" / "checkpoint_0_1.pth.tar")
    ratio = plan["width_names"].index("mlp_ratio")
    widths = [width * (1.25 if i == ratio else 1) for i, width in enumerate(plan["widths"])]
    request = BackboneRequest(
        arch="timm/test_vit",
        split_factor=2,
        num_classes=10,
        dataset="digits",
        crop_size=16,
        widths=tuple(widths),
        way=plan["way"],
        width_names=tuple(plan["width_names"]),
        library=plan["library"],
    )
    network = build_splitnet(request, seed=3)
    teacher = tmp_path / "teacher.pth.tar"
    save_checkpoint(plan | {"widths": widths, "state_dict": published_keys(network.state_dict())}, teacher)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("solved again")

    monkeypatch.setattr("model.library.divide", refuse)
    timm_nets.library()._plan.cache_clear()
    argv = [*base, "--method", "kd", "--teacher", str(teacher), "--student_of", "1"]
    assert train_split.main([*argv, "--model_dir", str(tmp_path / "student")]) == 0
    student = load_checkpoint(tmp_path / "student" / "checkpoint_0_1.pth.tar")
    assert {name: student[name] for name in ("way", "widths", "width_names")} == {
        "way": "arguments",
        "widths": widths,
        "width_names": plan["width_names"],
    }
    one = network.models[0].state_dict()
    assert {key.removeprefix("module.models.0."): value.shape for key, value in student["state_dict"].items()} == {
        key: value.shape for key, value in one.items()
    }
