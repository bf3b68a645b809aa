"""Networks on processes of their own (--placement networks) train as one process that holds them all."""

import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import own
from method import methods
from method.contract import LOGITS
from model import BackboneRequest, build_splitnet
from record import checkpoint as ckpt
from tests.kills import at_call
from tests.runs import TINY, Finished, in_fork, same_ending, train, without_times
from tests.test_train_distributed import start_together, train_together
from training.cost import peak_memory
from utils.launch import World
from utils.mesh import Mesh

CPU = torch.device("cpu")
NETWORKS = ["--placement", "networks"]
# 55 images to train on, 5 held out: three batches an epoch, of which the last has 11 images
EXACT = [*TINY, "--dataset", "folder", "--amp_dtype", "fp64", "--seed", 5, "--print_freq", 2, "--epochs", 3]
EXACT += ["--batch_size", 22, "--drop_last", 0, "--max_steps", 8, "--is_cutout", 1, "--val_fraction", 0.08]
ALL = ["--is_mixup", 1, "--ema_decay", 0.5, "--clip_grad", 1.0, "--iters_to_accumulate", 2, "--is_label_smoothing", 1]
SYNCED = ["--is_syncbn", 1]


THREE = ["--arch", "wrn_10_1,wrn_10_1,wrn_10_1"]


def networks(count: int, *flags: object) -> list[object]:
    return ["--split_factor", count, *flags]


# name -> (flags, processes, flags of these processes alone)
QUICK = {
    "two networks": (networks(2, *ALL), 2),
    "two groups of two": (networks(2, *ALL, *SYNCED), 4),
}
SLOW = {
    "three networks, ensemble's loss, dropout": (
        [*THREE, *ALL, "--is_ensembled_loss", 1, "--wrn_dropout", 0.3],
        3,
    ),
    "two networks in each of two processes": (networks(4, *ALL, "--execution", "parallel"), 2),
    "two groups of three": (networks(2, *SYNCED, "--cutmix_alpha", 1.0, "--is_mixup", 1), 6),
    "three groups of two": ([*THREE, *SYNCED, "--method", "dml"], 6),
}
AGREEMENTS = (
    "js_divergence",
    "kl_seperate",
    "kl_mean",
    "mse_seperate",
    "mse_mean",
    "smooth_l1_seperate",
    "smooth_l1_mean",
)
LONG = {
    **{loss: (networks(2, "--cot_loss_choose", loss), 2) for loss in AGREEMENTS},
    **{f"{method} of two": (networks(2, *ALL, "--method", method), 2) for method in ("dml", "kdcl")},
    "kdcl of three": ([*THREE, *ALL, "--method", "kdcl"], 3),
    "independent": (networks(4, *ALL, "--method", "independent"), 4),
    "dml's ensemble": ([*THREE, "--method", "dml", "--dml_teacher", "ensemble"], 3),
    "one view for all": (networks(2, "--is_diff_data_train", 0, "--optimizer", "AdamW"), 2),
    "stacked": (networks(4, "--execution", "stacked"), 2),
    "threads that synchronise": (networks(4, *SYNCED, "--execution", "parallel"), 4),
    "groups that are asked for": (networks(4, *SYNCED), 4, ["--network_groups", 2]),
    "shake": (networks(2, "--arch", "shake_resnet26_2x96d", "--max_steps", 2), 2),
    "several backbones": (["--arch", "resnet20,resnet32", "--method", "dml"], 2),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of small images, kept in memory."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 30), ("val", 7)):
        for label, name in enumerate(("ant", "bee")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.linear_gradient("L").resize((16, 16)).rotate(90 * label + 7 * i)
                image.convert("RGB").save(folder / f"{i}.png")
    return root


def same_run(
    images: Path, folder: Path, flags: Sequence[object], world_size: int, placing: Sequence[object] = ()
) -> None:
    """One process with all networks, and `world_size` processes with their own, end alike to 1e-10."""
    argv = [*EXACT, "--data", images, *flags]
    alone = train_together([*argv, "--model_dir", folder / "1"], folder / "alone", 1)[0].result
    placed = [*argv, *NETWORKS, *placing, "--model_dir", folder / "n"]
    spread = train_together(placed, folder / "many", world_size)
    assert all(other.stdout == "" for other in spread[1:])
    for name in ("acc1", "ensemble_acc1", "params_total", "macs_total", "params_one", "split_factor"):
        assert spread[0].result[name] == alone[name], name
    assert (spread[0].result["placement"], spread[0].result["world_size"]) == ("networks", world_size)
    same_checkpoints(folder / "n", folder / "1")
    assert ckpt.state_sha256(newest(folder / "n")["state_dict"]) == spread[0].result["state_sha256"]
    lines = [without_times(folder / name / "metrics.jsonl") for name in ("1", "n")]
    assert {line["kind"] for line in lines[0]} >= {"train", "eval"}
    for one, many in zip(*lines, strict=True):
        assert one["kind"] == many["kind"]
        for key in ("loss", "loss_ce", "acc1"):
            assert many.get(key) == pytest.approx(one.get(key), abs=1e-9), key


def newest(folder: Path) -> dict:
    return ckpt.load_checkpoint(ckpt.list_checkpoints(folder)[0])


def same_checkpoints(one: Path, other: Path) -> None:
    found, expected = newest(one), newest(other)
    assert list(found) == list(expected)
    assert found["parameters"] == expected["parameters"]
    for key in ("state_dict", "ema"):
        assert list(found.get(key, {})) == list(expected.get(key, {}))
        for name, value in found.get(key, {}).items():
            torch.testing.assert_close(value, expected[key][name], rtol=0, atol=1e-10, msg=name)
    assert len(found["optimizer"]["param_groups"]) == len(expected["optimizer"]["param_groups"])
    for place, state in expected["optimizer"]["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(
                found["optimizer"]["state"][place][name], value, rtol=0, atol=1e-9, msg=found["parameters"][place]
            )


@pytest.mark.parametrize("case", QUICK)
def test_networks_on_their_own_processes_give_the_run_of_one(case: str, images: Path, tmp_path: Path) -> None:
    same_run(images, tmp_path, *QUICK[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_several_groups_and_losses_give_the_run_of_one(case: str, images: Path, tmp_path: Path) -> None:
    same_run(images, tmp_path, *SLOW[case])


@pytest.mark.long
@pytest.mark.parametrize("case", LONG)
def test_every_loss_and_execution_gives_the_run_of_one(case: str, images: Path, tmp_path: Path) -> None:
    same_run(images, tmp_path, *LONG[case])


@pytest.mark.slow
@pytest.mark.parametrize("of", ["one whole network", pytest.param("each network", marks=pytest.mark.long)])
def test_networks_that_start_from_files_give_the_run_of_one(of: str, images: Path, tmp_path: Path) -> None:
    """Slices of a parent with statistics made anew; a file each, of which one brings no head that fits."""
    names, flags = ["whole"], networks(2)
    if of == "each network":
        names, flags = ["fits", "other"], ["--arch", "resnet20,resnet20"]
    for number, name in enumerate(names):
        request = BackboneRequest(arch="resnet20", num_classes=2 if name == "fits" else 7, dataset="digits")
        torch.save(build_splitnet(request, seed=number).state_dict(), tmp_path / f"{name}.pth")
    files = ",".join(str(tmp_path / f"{name}.pth") for name in names)
    same_run(images, tmp_path, [*flags, *ALL, "--pretrained", files, "--lr_multiplier", 5], 2)
    started = (tmp_path / "many" / "rank0" / "err0").read_text()
    assert ("running statistics made anew" in started) == (of == "one whole network")
    assert "the head models.1.fc has another size there and starts anew" in started


@pytest.mark.slow
def test_a_checkpoint_goes_from_networks_to_data_and_back(images: Path, tmp_path: Path) -> None:
    argv = [*EXACT, "--data", images, *networks(2, *ALL, *SYNCED)]
    train_together([*argv, "--model_dir", tmp_path / "1"], tmp_path / "alone", 1)
    changing = [*argv, "--model_dir", tmp_path / "m", "--resume", "auto", "--max_steps"]
    train_together([*changing, 2, *NETWORKS], tmp_path / "first", 4)
    then = train_together([*changing, 5], tmp_path / "then", 1)[0]
    assert "changed on resume: placement" in then.stderr
    train_together([*changing, 8, *NETWORKS], tmp_path / "last", 2)
    same_checkpoints(tmp_path / "m", tmp_path / "1")


@pytest.fixture(scope="module")
def unbroken(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path, Finished]:
    """A run of two networks that is not killed: its flags, its folder and how it ended."""
    folder = tmp_path_factory.mktemp("unbroken")
    argv = [*EXACT, "--amp_dtype", "fp32", "--data", images, *networks(2, *ALL), *NETWORKS, "--save_steps", 2]
    return argv, folder / "u", train_together([*argv, "--model_dir", folder / "u"], folder / "s", 2)[0]


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["a checkpoint", "the other networks"])
def test_killed_and_resumed_networks_end_bit_for_bit(
    killed: str,
    unbroken: tuple[list[object], Path, Finished],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    argv, expected, reference = unbroken
    again = [*argv, "--model_dir", tmp_path / "m", "--resume", "auto"]
    hook = {0: at_call("rename", 6)} if killed == "a checkpoint" else {1: at_call("training step", 6)}
    runs = start_together(again, tmp_path / "k", 2, before=hook)
    results = [run.wait(100) for run in runs]
    (rank,) = hook
    assert results[rank].code == -signal.SIGKILL
    assert re.search(rf"process {rank} (died|has not answered)", results[1 - rank].stderr), results[1 - rank].stderr
    record_property("kills", 1)
    same_ending(tmp_path / "m", expected, train_together(again, tmp_path / "r", 2)[0], reference)
    record_property("identical", 1)


def start_alone(folder: str, group: int | None) -> tuple[int, dict[str, float]]:
    """How much the peak of memory grows as a process of four groups starts, None: of one; sums of its weights."""
    mesh = None
    if group is not None:  # nothing is sent before the first step
        nobody: Any = None
        mesh = Mesh(groups=4, replicas=1, group=group, replica=0, network_dim=nobody, data_dim=nobody)
    before = peak_memory(CPU)
    flags = ["--arch", "wide_resnet28_10", "--split_factor", "4", "--workers", "0"]
    trainer = own.open_trainer(flags, Path(folder), CPU, world=World(0, 1, 0, 1, CPU, mesh=mesh))
    trainer.saver.close()
    weights = trainer.network.named_parameters()
    return peak_memory(CPU) - before, {name: float(value.double().sum()) for name, value in weights}


def test_a_process_starts_with_the_weights_of_its_own_networks_alone(tmp_path: Path) -> None:
    whole, expected = in_fork(start_alone, str(tmp_path / "all"), None)
    part, found = in_fork(start_alone, str(tmp_path / "one"), 2)
    assert part < whole - 10**8  # of 146 MB of weights
    assert found == {name: value for name, value in expected.items() if name.startswith("models.2.")}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([*NETWORKS, "--exchange", "e", "--network", 0], "--exchange cannot go with --placement networks"),
        (["--network_groups", 2], "--network_groups 2 is for --placement networks"),
        ([*NETWORKS, "--split_factor", 2], "needs several processes"),
        ([*NETWORKS, "--method", "dks"], "have more in common than logits: the branches inside its networks"),
        ([*NETWORKS, "--method", "l_mcl"], "have more in common than logits: embeddings"),
        ([*NETWORKS, "--method", "cream"], "have more in common than logits: the weights of its supernet"),
        (NETWORKS, "needs several networks, and there is one"),
    ],
)
def test_what_cannot_be_spread_is_refused_in_one_line(flags: list, expected: str, tmp_path: Path) -> None:
    refused = train([*TINY, *flags, "--model_dir", tmp_path / "m"], tmp_path)
    assert refused.code == 2
    assert expected in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "m").exists()


def test_only_methods_that_exchange_logits_alone_are_spread() -> None:
    kinds = {name: methods.get(name) for name in methods.names()}
    assert {name for name, kind in kinds.items() if kind.may_be_spread()} == {
        "co_training",
        "dml",
        "independent",
        "kdcl",
    }
    for name, kind in kinds.items():
        assert kind.may_be_spread() == (kind.exchanges == LOGITS), name
        assert not (kind.runs_networks_itself and kind.exchanges == LOGITS), name
