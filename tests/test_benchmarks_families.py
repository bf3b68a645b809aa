"""The driver of one short run per family: every family has a plan, and what its runs recorded becomes a table."""

import json

import pytest

from benchmarks import families
from model import backbones, split_list
from parser_params import parse_config
from utils.errors import UserError


def test_every_family_has_a_plan():
    assert set(families.PLANS) == {entry.family for _, entry in backbones.items()}


@pytest.mark.parametrize("family", families.PLANS)
def test_plans_are_command_lines_of_the_trainer(family):
    plan = families.PLANS[family]
    config = parse_config(families.flags_of(plan, "images", "run"))
    archs = split_list(config.arch)
    assert {backbones.get(arch).family for arch in archs} == {family}
    assert max(len(archs), config.split_factor) == (1 if family == "resnest" else 2)
    assert (config.max_steps, config.crop_size) == (plan.steps, plan.crop_size)


def make_images(folder, classes, split, count):
    for name in classes:
        (folder / split / name).mkdir(parents=True)
        for number in range(count):
            (folder / split / name / f"{number}.jpg").write_bytes(b"")


def test_a_part_of_the_images_by_links(tmp_path):
    make_images(tmp_path / "data", ("a", "b"), "train", 3)
    make_images(tmp_path / "data", ("a", "b"), "val", 2)
    for _ in range(2):  # a second time changes nothing
        families.take_part(tmp_path / "data", tmp_path / "part", train=2, test=1)
    links = sorted(str(path.relative_to(tmp_path / "part")) for path in (tmp_path / "part").rglob("*.jpg"))
    assert links == [*(f"train/{c}/{n}.jpg" for c in "ab" for n in (0, 1)), "val/a/0.jpg", "val/b/0.jpg"]
    with pytest.raises(UserError, match=r"train/a .*3 images.* 4"):
        families.take_part(tmp_path / "data", tmp_path / "part", train=4, test=1)
    with pytest.raises(UserError, match="expected images in train"):
        families.take_part(tmp_path / "nothing", tmp_path / "part", train=1, test=1)


def test_report_of_ended_runs(tmp_path, capsys):
    make_images(tmp_path / "data", ("a",), "train", 1)
    make_images(tmp_path / "data", ("a",), "test", 1)
    for family, losses in (("resnet", (4.6, 4.0)), ("wrn", (4.0, 4.2))):
        run = tmp_path / "runs" / family
        run.mkdir(parents=True)
        method = "co_training" if family == "resnet" else "dml"
        results = {"arch": family, "method": method, "split_factor": 2, "steps": 9, "acc1": [10.0, 20.0]}
        (run / "results.json").write_text(json.dumps({**results, "ensemble_acc1": 30.0}))
        records = [{"kind": "train", "step": i, "loss_ce": loss} for i, loss in enumerate(losses)]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*records, {"kind": "eval"}])))
    flags = ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), "--family", "resnet", "wrn"]
    code = families.main([*flags, "--train_per_class", "1", "--test_per_class", "1"])
    assert code == 1  # one of the two does not fall
    text = (tmp_path / "runs" / "families.md").read_text()
    assert "| resnet | `resnet` | 2 | 32, 32 | 9 | 2.300 | 2.000 | 10.0, 20.0 | 30.0 |" in text
    assert "| wrn | `wrn` | 2 full |" in text
    assert "The loss falls in 1 of 2 families:" in text
    assert "Not trained: cifar_resnet, " in text
    assert (tmp_path / "runs" / "families.png").stat().st_size > 1000
    assert "python train_split.py --arch resnet20 --split_factor 2" in capsys.readouterr().out
