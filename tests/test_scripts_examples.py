"""What miscs/from_another_project.md shows is run: its examples, its Python lines, torch.hub beside other modules."""

import importlib.util
import json
import re
import sys

import pytest

from tests import runs
from tests.somebody import ROOT, call, make_project

PAGE = ROOT / "miscs" / "from_another_project.md"
EXAMPLES = ROOT / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]


def test_every_example_is_run_here_and_stands_on_the_page():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {"own_loop.py", "compiled.py", "ddp.py", "with_lightning.py"}
    assert set(re.findall(r"\(\.\./examples/(\w+\.py)\)", PAGE.read_text(encoding="utf-8"))) == names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "after", "says"),
    [
        ("own_loop.py", (), (), "16 images classified"),
        ("compiled.py", (), ("aot_eager",), "compiled and not: "),
        ("ddp.py", TORCHRUN, (), "the same weights in every process: True"),
        ("with_lightning.py", (), (), "'ensemble_acc1': "),
    ],
)
def test_example(name, before, after, says, tmp_path):
    if name == "with_lightning.py" and importlib.util.find_spec("lightning") is None:
        pytest.skip("needs the package lightning")
    done = call([sys.executable, *before, EXAMPLES / name, *after], tmp_path, PYTHONPATH=str(ROOT))
    assert says in done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Somebody's project with a run of ours in it."""
    folder = make_project(tmp_path_factory.mktemp("page") / "project")
    done = runs.train([*runs.TINY, "--split_factor", 2, "--max_steps", 1, "--model_dir", folder / "runs" / "a"], folder)
    assert done.code == 0, done.stderr
    return folder


def python_of_the_page(*, hub: bool) -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return "\n".join(block for block in blocks if ("torch.hub" in block) == hub)


@pytest.mark.slow
def test_the_lines_of_the_page(project):
    blocks = python_of_the_page(hub=False)
    assert blocks.count("load(") >= 1
    assert blocks.count("divide(") >= 2
    # in a folder without modules of our names, because here the repository itself is on the path
    plain = project.parent / "plain"
    plain.mkdir()
    for name in ("runs", "photo.jpg"):
        (plain / name).symlink_to(project / name)
    said = call([sys.executable, "-c", blocks], plain, PYTHONPATH=str(ROOT)).stdout
    assert "ResNet divided by 2 (params): 2 x " in said
    assert re.match(r"\d 0\.\d+\n", said)


@pytest.mark.slow
def test_torch_hub_beside_modules_of_the_same_names(project):
    lines = python_of_the_page(hub=True).replace("PATH/OF/THIS/REPOSITORY", str(ROOT))
    code = f"""
import json, sys, torch
import utils, model as theirs, dataset, loss, eval as evaluation_of_mine
{lines}
assert all(one.MINE for one in (utils, theirs, dataset, loss, evaluation_of_mine))
from cotrain import SplitNet, losses, methods
assert isinstance(network, SplitNet) and isinstance(model.network, SplitNet)
found = model.predict("photo.jpg")
rooms = ("model.", "utils.", "dataset.", "evaluation", "record", "recipe", "method", "training", "parser_params")
assert not [name for name in sys.modules if name.startswith(rooms)]
assert sys.modules["model"] is theirs
print(json.dumps([sorted(methods.names()), found.probabilities_BK.sum().item()]))
"""
    names, total = json.loads(call([sys.executable, "-c", code], project).stdout.splitlines()[-1])
    assert "co_training" in names
    assert total == pytest.approx(1, abs=1e-5)
