"""The wheel: one name, imports rewritten and nothing else, and it works beside a project with our rooms' names."""

import csv
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from base64 import urlsafe_b64encode
from hashlib import sha256
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.loading import load
from script import wheel_backend
from script.wheel_backend import rewritten, wheel_files
from tests.somebody import ROOT, call, make_project

OURS, AT_HOME = wheel_backend.parts_of()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from model import SplitNet\n", "from cotrain.model import SplitNet\n"),
        ("from  utils.text import (\n    escaped,\n)\n", "from  cotrain.utils.text import (\n    escaped,\n)\n"),
        ("import loss as losses\n", "import cotrain.loss as losses\n"),
        ("import os, loss.agreement as a, sys\n", "import os, cotrain.loss.agreement as a, sys\n"),
        ("def f():\n    import eval\n", "def f():\n    from cotrain import eval\n"),
        ("é = 1; from utils import seed\n", "é = 1; from cotrain.utils import seed\n"),
        ("import modelling\nfrom models import x\nfrom . import model\n", None),
        ('"""from model import SplitNet"""\nmodel = "model"  # from model import x\n', None),
        ("import cotrain.losses as losses\nfrom cotrain import load\n", None),
        ("import torch\r\nfrom model import a\r\n", "import torch\r\nfrom cotrain.model import a\r\n"),
    ],
)
def test_imports_of_ours_come_from_inside_and_all_else_stays(source, expected):
    assert rewritten(source.encode(), "a.py").decode() == (source if expected is None else expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import utils.text\n", "write it as"),
        ("import utils, model\n", "write it as"),
        ("x = 'dataset.source'\n", "names the module dataset.source in a string"),
        ("import importlib\nimportlib.import_module('model')\n", "import_module of a module of ours"),
        ("from tests import runs\n", "stays at home"),
        ("def f():\n    from benchmarks import own\n", "stays at home"),
        ("from\\\n  model import x\n", "over a line's end"),
    ],
)
def test_what_cannot_be_rewritten_is_refused_by_file_and_line(source, message):
    with pytest.raises(SyntaxError, match=rf"a.py:\d: .*{message}"):
        rewritten(source.encode(), "a.py")


def test_every_file_of_the_project_changes_in_its_imports_only():
    files = wheel_files()
    originals = {wheel_backend.place_in_wheel(path): path.read_bytes() for path in wheel_backend.source_files()}
    assert files.keys() == originals.keys()
    assert {"cotrain/__init__.py", "cotrain/train_split.py", "cotrain/model/splitnet.py"} <= files.keys()
    bare = re.compile(rb"^\s*(from|import)\s+(" + "|".join(OURS - {"cotrain"}).encode() + rb")\b")
    changed = 0
    for place, content in files.items():
        pairs = list(zip(originals[place].splitlines(), content.splitlines(), strict=True))
        for before, after in pairs:
            assert not bare.match(after), f"{place}: {after!r}"
            if before != after:
                assert bare.match(before)
                assert after.replace(b"cotrain.", b"", 1) == before or after.replace(b"from cotrain ", b"", 1) == before
                changed += 1
    assert changed > 500


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return folder / wheel_backend.build_wheel(str(folder))


def test_nothing_but_cotrain_is_at_the_top(built):
    with zipfile.ZipFile(built) as wheel:
        names = wheel.namelist()
        about = next(name.split("/")[0] for name in names if name.endswith("/METADATA"))
        assert {name.split("/")[0] for name in names} == {"cotrain", about}
        assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
        metadata = wheel.read(f"{about}/METADATA").decode()
        rows = {row[0]: row[1:] for row in csv.reader(wheel.read(f"{about}/RECORD").decode().splitlines())}
        assert rows.keys() == set(names)
        for name in names:
            content, (digest, size) = wheel.read(name), rows[name]
            if not name.endswith("/RECORD"):
                assert digest == "sha256=" + urlsafe_b64encode(sha256(content).digest()).rstrip(b"=").decode()
                assert int(size) == len(content)
    assert "Name: divide-and-co-training\n" in metadata
    for line in wheel_backend.requirements():
        assert f"Requires-Dist: {line}\n" in metadata
    assert "Requires-Dist: timm>=1.0.15; extra == 'timm'\n" in metadata


def test_the_source_archive_gives_the_same_wheel(built, tmp_path):
    name = wheel_backend.build_sdist(str(tmp_path))
    with tarfile.open(tmp_path / name) as archive:
        archive.extractall(tmp_path, filter="data")
    (inside,) = (path for path in tmp_path.iterdir() if path.is_dir())
    code = f"import wheel_backend; wheel_backend.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=inside / "script", check=True)
    assert (tmp_path / built.name).read_bytes() == built.read_bytes()


# ---- beside a project that has rooms of the same names ---------------------------------------------------------------


API = """
import json, sys
import utils, model, dataset, loss, eval as evaluation_of_mine
assert all(one.MINE for one in (utils, model, dataset, loss, evaluation_of_mine))
import numpy as np, torch, torchvision
from cotrain import SplitNet, divide, load, losses, methods

loaded = load("run")
assert isinstance(loaded.network, SplitNet)
found = loaded.predict(["photo.jpg", np.asarray(__import__("PIL.Image").Image.open("photo.jpg"))])
network, plan = divide(torchvision.models.resnet18(num_classes=4), 2, crop_size=64)
logits_SBK = network(torch.randn(2, 3, 3, 64, 64))
loss_ce = losses.cross_entropy(logits_SBK[0], torch.tensor([0, 1, 2])).mean()
(losses.js_divergence(logits_SBK).mean() + loss_ce).backward()
assert all(parameter.grad is not None for parameter in network.models[0].parameters())
assert "co_training" in methods.names()
rooms = {"record", "recipe", "method", "training", "opening", "evaluation", "parser_params", "train_split", "script"}
mine = ("model.", "utils.", "dataset.")
ours = [name for name in sys.modules if name.split(".")[0] in rooms or name.startswith(mine)]
assert not ours, ours
print(json.dumps({"probabilities": found.probabilities_BK.tolist(), "params": plan.params_difference}))
"""


@pytest.mark.long
def test_installed_in_a_fresh_environment_beside_a_project_of_the_same_names(tmp_path):
    # not importlib.util.find_spec: setuptools' finder warns there, where a test before this one imported distutils
    if any(PathFinder.find_spec(name) is None for name in ("pip", "venv")):
        pytest.skip("needs pip and venv to install the wheel")
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and the rest, without downloads
    before = {path.name for path in site.iterdir()}
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(ROOT)]
    subprocess.run(install, check=True, capture_output=True)
    assert {path.name for path in site.iterdir()} - before - {"__pycache__"} == {
        "cotrain",
        "divide_and_co_training-1.0.0.dist-info",
    }
    project = make_project(tmp_path / "project")

    def run(*words: object) -> str:
        return call(words, project).stdout

    cotrain = environment / "bin" / "cotrain"
    tiny = ["--dataset", "digits", "--arch", "resnet20", "--split_factor", 2, "--max_steps", 2, "--batch_size", 96]
    run(cotrain, "train", *tiny, "--amp_dtype", "fp32", "--no_cuda", "--model_dir", "run")
    # processes that start anew find everything under the new name: ranks and decoders
    two = ["--multiprocessing_distributed", "--nproc_per_node", 2, "--dist_url", "env://"]
    run(cotrain, "train", *tiny, "--amp_dtype", "fp32", "--no_cuda", "--model_dir", "two", *two)
    run(python, "-m", "cotrain", "eval", "run", "--no_cuda")
    run(cotrain, "predict", "run", "photo.jpg", "--model_dir", "out", "--no_cuda", "--workers", 2)
    results = json.loads(run(cotrain, "export", "run", "--out", "digits.pt2").splitlines()[-1])
    assert results["preprocessing"]["crop"] == 16
    said = json.loads(run(python, "-W", "error::ImportWarning", "-c", API).splitlines()[-1])
    (logits,) = (project / "out").rglob("logits.npz")
    expected_BK = torch.from_numpy(np.load(logits)["ensemble"]).softmax(dim=-1)
    for row in said["probabilities"]:
        np.testing.assert_allclose(row, expected_BK[0].numpy(), rtol=0, atol=1e-6)
    assert abs(said["params"]) < 0.02
    # the same files here, by the repository
    mine = load(project / "run").predict(project / "photo.jpg").probabilities_BK
    np.testing.assert_allclose(mine[0].numpy(), said["probabilities"][0], rtol=0, atol=1e-6)
    wrong = call([cotrain, "eval", "nowhere"], project, expected=2)
    assert wrong.stderr.splitlines()[-1].startswith("cotrain eval: ")
    assert "Traceback" not in wrong.stderr
