"""Parameters and MACs from flags alone, equal to the published networks' counts."""

import json
from pathlib import Path

import pytest

import train_split
from model import backbones
from script.published import PUBLISHED
from script.summarise_zoo import (
    MARKS,
    SPLIT_FACTORS,
    TITLES,
    markdown,
    replace_table,
    zoo_requests,
    zoo_rows,
)
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
ROWS = json.loads((ROOT / "tests" / "golden" / "params_macs.json").read_text())


def run(*argv: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = train_split.main(["--is_summary", "1", *(str(word) for word in argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def row_of(arch: str, dataset: str, split_factor: int, variant: str | None = None) -> dict[str, int]:
    wanted = {"arch": arch, "dataset": dataset, "split_factor": split_factor}
    (row,) = [r for r in ROWS if wanted.items() <= r.items() and r.get("variant") == variant]
    return row


@pytest.mark.parametrize(
    ("arch", "dataset", "split_factor", "variant", "flags"),
    [
        ("resnet110", "cifar100", 4, None, ()),
        ("wide_resnet50_2", "imagenet", 2, None, ()),
        ("efficientnetb1", "imagenet", 2, "lightnet", ()),
        ("densenet190", "cifar100", 1, "densenet3", ("--is_official_densenet", 0)),
    ],
)
def test_golden_counts(arch, dataset, split_factor, variant, flags, capsys):
    row = row_of(arch, dataset, split_factor, variant)
    command = ("--arch", arch, "--dataset", dataset, "--split_factor", split_factor, *flags)
    code, out, _ = run(*command, capsys=capsys)
    assert code == 0
    result = json.loads(out.splitlines()[-1])
    for name in ("params_one", "params_total", "macs_total", "crop"):
        assert result[name] == row[name]
    assert result["macs_one"] * split_factor == row["macs_total"]
    # thop counts batch norm and pooling too
    assert row["macs_total"] < result["thop_macs_total"] < 1.2 * row["macs_total"]
    assert f"{row['params_total'] / 1e6:.3f}" in out.splitlines()[-2]


def test_the_crop_is_the_data_sets(capsys):
    _, out, _ = run("--arch", "resnet20", "--dataset", "digits", "--split_factor", 2, capsys=capsys)
    assert json.loads(out.splitlines()[-1])["crop"] == 16


def test_several_networks_and_one_of_them(capsys):
    def size(*flags: object) -> dict[str, int]:
        code, out, err = run("--dataset", "cifar10", *flags, capsys=capsys)
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    small, large = size("--arch", "resnet20"), size("--arch", "resnet32")
    both = size("--method", "dml", "--arch", "resnet20,resnet32")
    assert both["params_one"] == small["params_one"]
    assert both["params_total"] == small["params_total"] + large["params_total"]
    assert both["macs_total"] == small["macs_total"] + large["macs_total"]
    assert both["split_factor"] == 2
    alone = size("--arch", "resnet20", "--split_factor", 4, "--is_train_sep", 1)
    assert alone["params_total"] == alone["params_one"] == size("--arch", "resnet20", "--split_factor", 4)["params_one"]


def test_open_data_sets_need_the_number_of_classes(capsys):
    for dataset in ("synthetic", "folder"):
        code, _, err = run("--arch", "resnet50", "--dataset", dataset, capsys=capsys)
        assert code == 2
        assert err.startswith("train_split.py: --is_summary opens no data")
        assert "--num_classes" in err
        command = ("--arch", "resnet50", "--dataset", dataset, "--num_classes", 1000, "--crop_size", 224)
        code, out, _ = run(*command, capsys=capsys)
        assert json.loads(out.splitlines()[-1])["params_one"] == row_of("resnet50", "imagenet", 1)["params_one"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--arch", "resnet111"), "--arch 'resnet111' is not a known backbone"),
        (("--arch", "resnet110", "--dataset", "imagenet"), "exists for small images only"),
        (("--arch", "resnet110", "--split_factor", 3), "--split_factor 3 is not possible"),
        (("--arch", "resnet110", "--num_classes", 7), "--num_classes 7: --dataset cifar10 has 10 classes"),
    ],
)
def test_mistakes(flags, message, capsys):
    code, out, err = run(*flags, capsys=capsys)
    assert code == 2
    assert out == ""
    assert message in err


ZOO = (ROOT / "miscs" / "zoo.md").read_text(encoding="utf-8")


def test_zoo_lists_every_division_and_published_row():
    archs = ["resnet20", "wide_resnet50_2", "cream_14", "se_resnext101_64x4d"]
    cases = [(r.arch, r.dataset, r.split_factor, r.crop_size) for r, _ in zoo_requests(archs, (1, 2, 3))]
    assert cases == [
        *(("resnet20", "cifar100", s, 32) for s in (1, 2)),
        *(("wide_resnet50_2", "imagenet", s, 224) for s in (1, 2)),
        *(("cream_14", "imagenet", s, 64) for s in (1, 2)),
        *(("cream_14", "cifar100", s, 32) for s in (1, 2)),
        *(("se_resnext101_64x4d", "imagenet", s, 224) for s in (1, 2, 3)),
        ("se_resnext101_64x4d", "imagenet", 2, 416),
    ]


def test_zoo_counts_and_marks_differences():
    rows = {(row[0], row[1], row[2]): row for row in zoo_rows(["wide_resnet50_2", "shake_resnet26_2x96d"], (1, 2))}
    golden = row_of("wide_resnet50_2", "imagenet", 2)
    row = rows["wide_resnet50_2", "imagenet", "2"]
    assert row[5] == f"{golden['params_total'] / 1e6:,.3f}"
    assert row[8] == f"{golden['macs_total'] / 1e9:,.4f}"
    assert (row[6], row[9], row[10]) == ("51.4", "10.9", "")
    assert rows["wide_resnet50_2", "imagenet", "1"][6] == "68.9 (-0.2 %)"
    assert rows["shake_resnet26_2x96d", "cifar10", "2"][6] == "23.3 (-2.2 %)"
    assert rows["shake_resnet26_2x96d", "cifar100", "2"][6] == ""


def test_published_figures_are_those_of_the_golden_rows():
    golden = {
        (r["arch"], r["dataset"], r["split_factor"], r["crop"]): (r["published_params_M"], r["published_gflops"])
        for r in ROWS
        if "published_params_M" in r
    }
    typed = {size[:4]: (float(size.params), float(size.macs)) for size in PUBLISHED if size.params}
    assert typed == golden


@pytest.mark.slow
def test_the_documented_zoo_is_up_to_date():
    """What the page says is what the script writes, byte for byte; counts of thop, which take long, excepted."""
    lines = ZOO.partition(MARKS[0])[2].partition(MARKS[1])[0].strip("\n").split("\n")
    documented = {line.split(" | ")[0].removeprefix("| ") for line in lines if line.count("|") == len(TITLES) + 1}
    assert documented - {"arch", "---"} == set(backbones.names())
    # the first of each family, and some with a published figure
    first = {entry.family: arch for arch, entry in reversed(list(backbones.items()))}
    archs = sorted({"resnet20", "wide_resnet50_3", "efficientnetb0", "resnexst50_4x16d", *first.values()})
    rows = zoo_rows(archs, SPLIT_FACTORS)
    head, *written = markdown(rows, archs).split("\n")[: len(rows) + 2]
    shown = [line for line in lines if line.startswith(tuple(f"| {arch} |" for arch in archs))]
    assert lines[0] == head
    assert len(shown) == len(rows)
    for row, line, ours in zip(rows, shown, written[1:], strict=True):
        has_thop = bool(row[6] or row[9])  # beside a published figure stands thop's count, in the last cell
        assert line.startswith(ours.removesuffix(" |")) if has_thop else line == ours, line
    assert lines[lines.index("") :] == markdown([], backbones.names()).split("\n")[2:]


def test_the_table_replaces_what_is_between_the_marks(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    replace_table(path, "new")
    assert path.read_text() == f"before\n{MARKS[0]}\nnew\n{MARKS[1]}\nafter\n"
    path.write_text("no marks")
    with pytest.raises(UserError, match="expected the lines"):
        replace_table(path, "new")
    with pytest.raises(UserError, match="No such file"):
        replace_table(tmp_path / "missing.md", "new")
