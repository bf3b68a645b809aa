"""The command `cotrain`: which program it starts, and with which words."""

import pytest

import eval as evaluation_program
from cotrain import commands
from evaluation import exporting


@pytest.fixture
def started(monkeypatch):
    """What the programs were called with; they end with exit code 7."""
    calls = []
    for program in (evaluation_program, exporting):
        monkeypatch.setattr(program, "main", lambda argv, name=program.__name__: calls.append((name, argv)) or 7)
    return calls


@pytest.mark.parametrize(
    ("words", "program", "argv"),
    [
        (["eval", "RUN", "--data", "d"], "eval", ["--resume", "RUN/model_best.pth.tar", "--data", "d"]),
        (["eval", "a.pth.tar"], "eval", ["--resume", "a.pth.tar"]),
        (["eval", "--resume", "a.pth.tar"], "eval", ["--resume", "a.pth.tar"]),
        (
            ["predict", "RUN", "p.jpg", "--tta", "flip"],
            "eval",
            ["--resume", "RUN/model_best.pth.tar", "--predict", "p.jpg", "--tta", "flip"],
        ),
        (["predict", "--help"], "eval", ["--help"]),
        (["export", "RUN", "--out", "a.onnx"], "evaluation.exporting", ["RUN/model_best.pth.tar", "--out", "a.onnx"]),
    ],
)
def test_commands_start_the_programs(words, program, argv, started, tmp_path, monkeypatch):
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "model_best.pth.tar").touch()
    monkeypatch.chdir(tmp_path)
    assert commands.main(words) == 7
    assert started == [(program, argv)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "'trian' is no command: expected one of train, eval, predict, export."),
        (["predict", "RUN"], "expected MODEL IMAGES"),
        (["predict", "--workers", "2"], "expected MODEL IMAGES"),
        (["predict", "a.pt2", "p.jpg"], "is an exported file"),
        (["eval", "."], "holds no checkpoint"),
    ],
)
def test_mistakes_are_one_line(words, message, started, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert commands.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("cotrain: ")
    assert err.count("\n") == 1
    assert not started


@pytest.mark.parametrize("words", [[], ["--help"], ["help"]])
def test_help(words, capsys):
    assert commands.main(words) == 0
    out = capsys.readouterr().out
    assert all(f"cotrain {name} " in out for name in commands.COMMANDS)
