"""--print_config and --list_archs: answered by text, without data, without a run folder."""

import pytest

import eval as evaluation_program
import train_split
from model.backbone import timm_nets
from model.registry import archs_matching
from parser_params import answer_at_once, parse_config, resolve_config
from utils.errors import UserError


def values_of(text: str) -> dict[str, str]:
    return dict(line.split(" = ", 1) for line in text.splitlines() if not line.startswith("#"))


def test_every_value_and_its_origin_are_those_of_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("momentum: 0.8\n")
    argv = ["--dataset", "cifar100", "--lr", "0.2", "--print_config", "--config", "c.yaml", "epochs", "7"]
    assert train_split.main(argv) == 0
    found = values_of(capsys.readouterr().out)
    config = resolve_config(parse_config(argv), data_recipe="cifar100")
    assert found == {name: f"{item['value']} ({item['origin']})" for name, item in config.described().items()}
    assert (found["lr"], found["momentum"], found["epochs"]) == ("0.2 (flag)", "0.8 (yaml)", "7 (override)")
    assert found["weight_decay"] == "0.0001 (recipe)"
    assert found["print_freq"] == "20 (default)"
    assert found["cot_weight"].endswith(")")  # the method's flags too
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_what_only_data_or_weights_decide_is_said():
    text = answer_at_once(parse_config(["--data", "photos_that_are_not_there.csv", "--print_config"]))
    assert text.splitlines()[0] == "# for images of 32 pixels: those of --data decide, or --crop_size says it"
    assert values_of(text)["arch"].startswith("resnet20 (recipe")
    large = answer_at_once(parse_config(["--data", "x.csv", "--crop_size", "224", "--print_config", "1"]))
    assert not large.startswith("#")
    assert values_of(large)["arch"].startswith("torchvision/resnet18 (recipe")
    tuned = answer_at_once(
        parse_config(["--data", "x.csv", "--pretrained", "library", "--arch", "torchvision/resnet18", "--print_config"])
    )
    assert "--pretrained" in tuned.splitlines()[1]
    assert "fine" in values_of(tuned)["lr"]


def test_eval_prints_the_flags_of_its_call(capsys):
    assert evaluation_program.main(["no_run", "--print_config", "--tta", "flip"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# flags alone")
    assert values_of(out)["tta"] == "flip (flag)"
    assert values_of(out)["resume"] == "no_run (flag)"


def test_wrong_flags_are_refused_before(capsys):
    assert train_split.main(["--print_config", "--split_factor", "2", "--arch", "resnet20,resnet32,resnet20"]) == 2
    assert capsys.readouterr().out == ""


def test_names_of_every_kind_are_listed(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert train_split.main(["--list_archs", "resnet5*"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert {"resnet50", "torchvision/resnet50", "timm/resnet50"} <= set(names)
    assert all(name.rpartition("/")[2].startswith("resnet5") for name in names)
    assert names.index("resnet56") < names.index("timm/resnet50") < names.index("torchvision/resnet50")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("torchvision/resnet18", ["torchvision/resnet18"]),
        ("resnet11?", ["resnet110"]),
        ("torchvision/*googlenet*", []),
    ],
)
def test_a_pattern_is_a_shells(pattern, found):
    if found:
        assert archs_matching(pattern) == found
    else:
        with pytest.raises(UserError, match="no name that --arch takes matches"):
            archs_matching(pattern)


def test_nothing_that_matches_names_near_ones(capsys):
    assert train_split.main(["--list_archs", "resnte50*"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("train_split.py: --list_archs resnte50*: no name that --arch takes matches. Near: resnet50")


def test_without_timm_the_others_are_listed(monkeypatch, caplog):
    def missing():
        raise UserError("--arch timm/NAME needs the package timm, which is not installed: pip install timm.")

    monkeypatch.setattr(timm_nets, "_import", missing)
    names = archs_matching("*resnet18")
    assert "torchvision/resnet18" in names
    assert not [name for name in names if name.startswith("timm/")]
    assert "pip install timm" in caplog.text


def test_the_bare_flag_lists_all():
    assert parse_config(["--list_archs"]).list_archs == "*"
    assert "resnet20" in archs_matching("*")
