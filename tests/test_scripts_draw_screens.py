"""The pictures of a terminal show what a terminal shows."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from script.draw_screens import Terminal, draw, lines_of, photograph, within_bar

START = "\r\x1b[K"


def test_a_picture_is_taken_while_a_bar_is_drawn() -> None:
    bars = [f"{START}epoch {number}/4 {'█' * number}░ left" for number in range(1, 5)]
    log = (
        f"$ train\r\nstarts\r\n{bars[0]}{bars[1]}{START}evaluating █{START}epoch 1/4 | 5 s\r\n{bars[2]}{bars[3]}{START}"
    )
    raw = log.encode()
    terminal = Terminal()
    terminal.close()
    shown = lines_of(terminal.screen(within_bar(raw, 0.7)))
    assert shown == ["$ train", "starts", "epoch 1/4 | 5 s", "epoch 3/4 ███░ left"]
    assert lines_of(terminal.screen(raw)) == shown[:-1]


def test_a_drawn_screen_has_its_lines(tmp_path: Path) -> None:
    draw(["$ a", "", "b", "█░"], tmp_path / "screen.png")
    with Image.open(tmp_path / "screen.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    height = pixels.shape[0]
    rows = [(pixels[y] != pixels[0, 0]).any() for y in range(height)]
    lit = [any(rows[15 + 20 * i : 33 + 20 * i]) for i in range(4)]
    assert lit == [True, False, True, True]
    assert pixels.shape[1] > 700


def test_without_a_browser_tensorboards_picture_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert photograph(tmp_path, tmp_path / "tensorboard.png") is False
    assert not list(tmp_path.iterdir())
