"""The command `cotrain`: which program it starts, and with which words."""

import signal

import pytest

import eval as evaluation_program
from cotrain import commands
from evaluation import exporting


@pytest.fixture
def started(monkeypatch):
    """What the programs were called with; they end with exit code 7."""
    calls = []
    for program in (evaluation_program, exporting):

        def called(argv, read=None, name=program.__name__):
            return calls.append((name, argv)) or 7

        monkeypatch.setattr(program, "main", called)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())  # reading flags holds signals until a program begins
    yield calls
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize(
    ("words", "program", "argv"),
    [
        (["eval", "RUN", "--data", "d"], "eval", ["RUN", "--data", "d"]),
        (["eval", "a.pth.tar"], "eval", ["a.pth.tar"]),
        (["eval", "--resume", "a.pth.tar"], "eval", ["--resume", "a.pth.tar"]),
        (["predict", "RUN", "p.jpg", "--tta", "flip"], "eval", ["RUN", "--predict", "p.jpg", "--tta", "flip"]),
        (["export", "RUN", "--out", "a.onnx"], "evaluation.exporting", ["RUN", "--out", "a.onnx"]),
    ],
)
def test_commands_start_the_programs(words, program, argv, started, tmp_path, monkeypatch):
    (tmp_path / "d" / "train" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert commands.main(words) == 7
    assert started == [(program, argv)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "'trian' is no command: expected one of train, eval, predict, export."),
        (["predict", "RUN"], "expected MODEL IMAGES"),
        (["predict", "--workers", "2"], "expected MODEL IMAGES"),
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


@pytest.mark.parametrize("words", [["eval", "RUN", "--tta", "flop"], ["predict", "RUN", "p.jpg", "--pedict", "x"]])
def test_wrong_flags_of_an_evaluation_end_before_it_begins(words, started, capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(words)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("eval.py: --")
    assert not started


def test_flipped_images_are_nothing_that_an_exported_file_has(started, capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(["export", "RUN", "--tta", "flip"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("export.py: --tta flip: an exported file answers for an image as it is.")
    assert not started


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_help_of_an_evaluation_is_its_programs(command, started, capsys):
    with pytest.raises(SystemExit) as end:
        commands.main([command, "--help"])
    assert end.value.code == 0
    assert "RUN_DIR|CHECKPOINT [--predict PATH]" in capsys.readouterr().out
    assert not started
