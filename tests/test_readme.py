"""What the documents show works: examples run, commands parse, links and paths point somewhere, prose wraps."""

import functools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import eval as eval_program
from method import methods
from model.division.coverage import LISTS
from parser_params import parse_config, resolve_config
from tests.kills import library_weights_at_hand
from tests.runs import Run

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(path for folder in (".", "benchmarks", "miscs") for path in (ROOT / folder).glob("*.md"))
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
METHODS = (ROOT / "miscs" / "methods.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str) -> list[str]:
    """Code blocks of one language; a line that ends in a backslash is joined to the next."""
    return [re.sub(r"\\\n\s*", "", block) for _, found, block in FENCE.findall(text) if found == language]


def commands(text: str, program: str) -> list[str]:
    """Lines of shell blocks that run one of the programs, without what follows them as a comment."""
    lines = [line.split("  #")[0].strip() for block in blocks(text, "bash") for line in block.splitlines()]
    return [line for line in lines if re.search(rf"^[^#]*\b({program})\.py\b", line)]


def arguments(command: str) -> list[str]:
    """What follows the program in a command; `...` and `$flags` stand for more."""
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(("train_split.py", "eval.py")))
    return [word for word in words[place + 1 :] if word not in ("...", "$flags")]


COMMANDS = [(path.name, line) for path in DOCUMENTS for line in commands(path.read_text("utf-8"), "train_split|eval")]


def test_the_example_runs() -> None:
    (code,) = blocks(TEXT, "python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert tuple(names["prediction_B"].shape) == (8,)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_commands_parse(document: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # --config script/cream/...
    if "found.yaml" in command:  # what a search writes
        command = command.replace("./runs/cream/search/found.yaml", "script/cream/retrain_14.yaml")
    if re.search(r"\beval\.py\b", command):
        eval_program.read(arguments(command))
    else:
        parse_config(arguments(command))


def test_there_are_commands() -> None:
    assert {document for document, _ in COMMANDS} >= {"README.md", "methods.md", "cream.md", "results.md"}
    assert len(COMMANDS) > 50


def pairs_of_spellings() -> Iterator[tuple[list[str], list[str]]]:
    """Commands of each block of methods.md that shows a published spelling above ours."""
    for block in blocks(METHODS, "bash"):
        _, found, rest = block.partition("# published\n")
        published, ours, our_lines = rest.partition("# ours\n")
        if found:
            assert ours
            yield published.splitlines(), our_lines.splitlines()


PAIRS = list(pairs_of_spellings())


def resolved(command: str, dataset: str) -> dict[str, Any]:
    config = resolve_config(parse_config(["--dataset", dataset, *arguments(command)]), data_recipe=dataset)
    names = methods.get(config.method).backbone_names(config.arch, config.method_options)
    return config.values() | {"arch": names, "data": None}


@pytest.mark.parametrize(("published", "ours"), PAIRS)
def test_published_commands_of_methods_are_ours(published: list[str], ours: list[str]) -> None:
    """What a block says of them is so: both sides are parsed, and stand for the same configuration."""
    assert published
    assert ours
    for command in ours:
        dataset = parse_config(arguments(command)).dataset
        values = resolved(command, dataset)
        for other in published:
            assert resolved(other, dataset) == values


@pytest.mark.parametrize("command", [line for line in commands(METHODS, "train_split") if "--config" not in line])
def test_commands_of_methods_resolve(command: str) -> None:
    resolved(command, parse_config(arguments(command)).dataset)


PUBLISHED = """--times 2 --meta-freq 50 --kd_T 3 --tau 0.1 --alpha 0.1 --beta 0.1 --gamma 1 --lam 1 --feat-dim 128
--number-net 2 --init-lr 0.1 --lr-type cosine --milestones 30 60 --epochs 300 --batch-size 128 --weight-decay 5e-4
--pos_k 1 --neg_k 8192 --nce_m 0.5 --manual_seed 0 --resume --resume-checkpoint a --evaluate --evaluate-checkpoint b
--checkpoint-dir c --gpu-id 0"""


def test_every_method_and_every_published_spelling_is_in_the_page() -> None:
    assert len(PAIRS) == 5
    assert all(f"| `{name}`" in METHODS for name in methods.names())
    assert all(re.search(rf"--method {name}\b", METHODS) for name in ("independent", "dml", "dks", "l_mcl"))
    config = parse_config(["--method", "l_mcl", *PUBLISHED.split()])
    assert (config.lr_mode, config.lr_milestones, config.seed, config.gpu_ids) == ("epoch_cos", (30, 60), 0, "0")
    assert (config.evaluate, config.resume, config.model_dir) == (True, "b", "c")
    flags = [word for word in PUBLISHED.split() if word.startswith("--")]
    assert len(config.given) - 1 == len(flags) - 2  # with --method; --resume and the two checkpoints are one flag
    assert not [flag for flag in flags if not re.search(rf"{flag}\b", METHODS)]


@pytest.mark.parametrize("name", NAMES)
def test_links_point_somewhere(name: str) -> None:
    """Links go to files that exist, and to headings that do."""
    path = ROOT / name
    for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", FENCE.sub("", path.read_text("utf-8"))):
        if target.startswith("https://"):
            continue
        other = path.parent / target if target else path
        assert other.exists(), target
        if heading:
            assert heading in headings(other.read_text("utf-8")), f"{target}#{heading}"


def headings(text: str) -> set[str]:
    """The anchors of a page, as they are made of its headings."""
    found = re.findall(r"^#+ (.*)$", FENCE.sub("", text), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_scripts_named_exist() -> None:
    for path in DOCUMENTS:
        for name in set(re.findall(r"\bscript/[\w.]+", path.read_text("utf-8"))):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


# a path with a slash; what begins as a user's folder does, or holds a <placeholder>, is the user's
PATH = re.compile(r"(?<![\w./<>{}*-])(?:\./)?((?:[\w.-]+/)+[\w.-]+\.(?:py|md|sh|json|yaml))\b")
OF_A_USER = ("runs/", "data/", "data_dir/", "model_dir/")


@pytest.mark.parametrize("name", NAMES)
def test_paths_named_exist(name: str) -> None:
    """Every path in backticks, in line or in a code block, is one of the project, or a user's."""
    text = (ROOT / name).read_text("utf-8")
    code = [block for *_, block in FENCE.findall(text)] + re.findall(r"`([^`]+)`", FENCE.sub("", text))
    for path in {path for part in code for path in PATH.findall(part)}:
        assert path.startswith(OF_A_USER) or (ROOT / path).exists(), path


def prose(text: str) -> Iterator[str]:
    """Lines that wrap: no code blocks, no tables, no line that is one link, one image or one piece of code."""
    for line in FENCE.sub("", text).splitlines():
        alone = re.fullmatch(r"\s*(!?\[.*\]\([^)]*\)|`[^`]*`)[.,:;]?", line)
        if not (alone or line.startswith("|")):
            yield line


def cells(text: str) -> Iterator[str]:
    for line in FENCE.sub("", text).splitlines():
        if line.startswith("|"):
            yield from (cell.strip() for cell in line.strip("|").split("|"))


@pytest.mark.parametrize("name", NAMES)
def test_prose_wraps_and_tables_hold_values(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    assert not [line for line in prose(text) if len(line) > 120]
    assert not [cell for cell in cells(text) if len(cell) > 160]


def test_every_goal_of_the_benchmarks_has_one_row() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| G\d+ \|", line)]
    assert [row[1].strip() for row in rows] == [f"G{number}" for number in range(1, 16)]
    assert {len(row) for row in rows} == {7}  # five cells between the outer bars


# ---- the first screen, as somebody with a folder of images would try it ---------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands of the first screen find where they are called: photos/, new_photos/ and labels.csv."""
    place = tmp_path_factory.mktemp("first_screen")
    generator = np.random.default_rng(0)
    rows = ["path,label"]
    for folder, count in (("photos/cat", 9), ("photos/dog", 9), ("new_photos", 3)):
        (place / folder).mkdir(parents=True)
        for i in range(count):
            level = 60 if folder.endswith("cat") else 180
            pixels = generator.integers(level, level + 60, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / folder / f"{i}.png")
            if folder.startswith("photos"):
                rows.append(f"{folder}/{i}.png,{folder.rpartition('/')[2]}")
    (place / "labels.csv").write_text("\n".join(rows) + "\n")
    return place


FIRST_SCREEN = TEXT[: TEXT.index("## Measured here")]
FIRST_COMMANDS = commands(FIRST_SCREEN, "train_split|eval")


@pytest.mark.slow
def test_the_first_screens_commands_run_as_they_stand(photos: Path) -> None:
    assert len(FIRST_COMMANDS) == 7
    for command in FIRST_COMMANDS:
        program, *words = shlex.split(command)[1:]
        places = ("photos/", "new_photos/", "labels.csv")
        argv = [str(photos / word) if word in places or word.startswith("runs/") else word for word in words]
        if "--pretrained" in argv:  # a network for large images, with weights that a download would bring
            argv += ["--epochs", "1"]
        patched = functools.partial(library_weights_at_hand, "resnet18")
        done = Run(argv, photos / "streams", module=program.removesuffix(".py"), before=patched).wait()
        assert done.code == 0, f"{command}\n{done.stderr}"
    assert json.loads((photos / "runs/photos/results.json").read_text())["ensemble_acc1"] > 75
    for name in ("curves.png", "split.csv", "predict_new_photos/predictions.csv", "eval/confusion.png"):
        assert (photos / "runs/photos" / name).is_file(), name


def test_pages_agree_on_how_many_networks_divide() -> None:
    """The rows of the table of coverage, the line under them, and what other pages say of both."""
    page = (ROOT / "miscs" / "coverage.md").read_text()
    counts: dict[str, tuple[int, int]] = {}
    for title, names in LISTS.items():
        heading = f'"{title}"' if " " in title else title
        part = page.partition(f"## `--coverage {heading}`")[2].partition("\n## ")[0]
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")]
        rows = [row for row in rows if "/" in row[0]]
        assert [row[:2] for row in rows] == [[name, s] for name in names for s in ("2", "4")], title
        two, four = (sum(row[1] == s and row[2] != "refused" for row in rows) for s in ("2", "4"))
        assert f"S = 2: {two} of {len(names)} divide, S = 4: {four} of {len(names)} divide." in part
        counts[title] = (two, four)
    (torchvision, same), timm, held_out = (counts[title] for title in ("torchvision", "timm", "held out"))
    assert torchvision == same
    prose = " ".join((ROOT / "miscs" / "divide_anything.md").read_text().split())
    assert (
        f"of {len(LISTS['torchvision'])} networks of torchvision {torchvision} divide by 2 and by 4, of "
        f"{len(LISTS['timm'])} families of timm {timm[0]} and {timm[1]}, of {len(LISTS['held out'])} others, for which "
        f"no rule was made, {held_out[0]} and {held_out[1]}."
    ) in prose
    for said in re.findall(r"(\d+) of (?:timm's )?79", TEXT):
        assert int(said) in timm
