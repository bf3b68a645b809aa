"""Pictures for the documents of what a user sees: a training and an evaluation in a real terminal, TensorBoard's page.

`python -m script.draw_screens [--out miscs]` trains two small networks on digits in a pseudo-terminal and draws what it
shows, in the middle of the run and at its end (screen_train.png, screen_end.png), and of their evaluation
(screen_eval.png). A headless Chromium takes tensorboard.png, where there is one with its driver and selenium. Needs
pyte (pyproject.toml, dev).
"""

import argparse
import contextlib
import os
import pty
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyte
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "headless_shell")
BACKGROUND, FOREGROUND, PROMPT = "#1e1e1e", "#d4d4d4", "#8ec07c"
BLOCKS = {"█": "#7aa6da", "░": "#3a3a3a"}
CLOSING = 'button[aria-label="Close side pane"]'  # of the settings, which lie beside the cards
DRAWN, CARDS = "card-view line-chart", 5
SHOWN = "tagFilter=eval/ensemble_(acc1%7Cnll)%7Ceval/dis%7Ctrain/(loss_ce%7Clearn)%7Cviews&smoothing=0"  # the cards
TRAINING = "python train_split.py --dataset digits --arch resnet20 --split_factor 2 --epochs 12"


class Terminal:
    """A pseudo-terminal, read as fast as it is written.

    Args:
        columns, rows: its size; 0 columns: it does not say how wide it is.

    Attributes:
        name: the device file that a program opens.
        raw: everything that was written to it.
    """

    def __init__(self, columns: int = 80, rows: int = 200) -> None:
        self.columns, self.rows = columns, rows
        self._leader, self.follower = pty.openpty()
        termios.tcsetwinsize(self.follower, (rows, columns))
        self.name = os.ttyname(self.follower)
        self.raw = b""
        self._is_open = True
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            ready = select.select([self._leader], [], [], 0.05)[0]
            if ready:
                self.raw += os.read(self._leader, 65536)
            elif not self._is_open:
                return

    def close(self) -> None:
        """Read what is still to be read, and close it; once is enough."""
        if not self._is_open:
            return
        self._is_open = False
        self._reader.join()
        os.close(self._leader)
        os.close(self.follower)

    def screen(self, raw: bytes | None = None) -> pyte.Screen:
        """What it shows after all, or after some, of what was written."""
        screen = pyte.Screen(self.columns or 80, self.rows)
        pyte.ByteStream(screen).feed(self.raw if raw is None else raw)
        return screen


def lines_of(screen: pyte.Screen) -> list[str]:
    """The lines of a screen down to the last that is not empty, without blanks at their ends."""
    lines = [line.rstrip() for line in screen.display]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def run_in_terminal(shown: str, command: Sequence[str], folder: Path) -> Terminal:
    """A command of the project in a terminal, to its end.

    Args:
        shown: what somebody would have typed, for the first line.
        command: what is run.
        folder: where it is run.

    Raises:
        SystemExit: it failed; its output says why.
    """
    terminal = Terminal()
    terminal.raw = f"$ {shown}\r\n".encode()
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=terminal.follower,
        stderr=terminal.follower,
        check=False,
    )
    terminal.close()
    if done.returncode:
        raise SystemExit(f"draw_screens: {shown}: failed:\n{terminal.raw.decode(errors='replace')}")
    return terminal


def within_bar(raw: bytes, share: float) -> bytes:
    """What was written up to a bar that was drawn about this share of the way."""
    start = raw.index(b"\r\x1b[K")
    places = [place for place in range(start, len(raw)) if raw.startswith(b"\r\x1b[Kepoch", place)]
    bars = [place for place in places if "█".encode() in raw[place : place + 200].split(b"\r\x1b[K")[1]]
    place = bars[int(share * (len(bars) - 1))]
    following = raw.find(b"\r\x1b[K", place + 1)
    return raw[:following]


def draw(lines: Sequence[str], path: Path, *, columns: int = 80, size: int = 15) -> None:
    """Lines of a terminal as a PNG, in the way of a terminal; a line that begins with `$ ` is what somebody typed."""
    import matplotlib

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"), size)
    width, height, margin = font.getlength("M"), round(1.3 * size), size
    picture = Image.new("RGB", (round(columns * width) + 2 * margin, len(lines) * height + 2 * margin), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        colour = PROMPT if line.startswith("$ ") else FOREGROUND
        for column, character in enumerate(line):
            if character in BLOCKS:  # without gaps between them
                left, top = margin + column * width, margin + row * height + 2
                pen.rectangle((left, top, left + width, top + height - 5), fill=BLOCKS[character])
                continue
            pen.text((margin + column * width, margin + row * height), character, font=font, fill=colour)
    picture.quantize(32).save(path, optimize=True)


@contextlib.contextmanager
def tensorboard_of(run: Path) -> Iterator[str]:
    """A TensorBoard that shows a run; gives its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--port", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
                break
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def photograph(run: Path, path: Path) -> bool:
    """TensorBoard's page of a run as a PNG; False where there is no browser for it."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from selenium import webdriver
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.wait import WebDriverWait
    except ImportError:
        return False
    if browser is None:
        return False
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("headless", "no-sandbox", "hide-scrollbars", "window-size=1500,1180", "no-first-run"):
        options.add_argument(f"--{flag}")
    for service in ("gpu", "background-networking", "component-update", "sync"):
        options.add_argument(f"--disable-{service}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        with tensorboard_of(run) as address:
            driver.get(f"{address}/?{SHOWN}#timeseries")
            patience = WebDriverWait(driver, 60)
            patience.until(lambda page: page.find_element(By.CSS_SELECTOR, CLOSING)).click()
            patience.until(lambda page: len(page.find_elements(By.CSS_SELECTOR, DRAWN)) >= CARDS)
            time.sleep(2)  # curves move to where they belong
            driver.save_screenshot(str(path))
    finally:
        driver.quit()
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m script.draw_screens", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "miscs", help="folder of the pictures [default: miscs]")
    out = parser.parse_args(argv).out.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        typed = f"{TRAINING} --model_dir runs/digits"
        train = [sys.executable, str(ROOT / "train_split.py"), *shlex.split(typed)[2:], "--no_cuda", "--seed", "1"]
        terminal = run_in_terminal(typed, train, folder)
        draw(lines_of(terminal.screen(within_bar(terminal.raw, 0.6))), out / "screen_train.png")
        lines = lines_of(terminal.screen())
        end = next(place for place, line in enumerate(lines) if line.startswith("test images"))
        draw(lines[end - 4 :], out / "screen_end.png")
        typed = "python eval.py runs/digits"
        evaluation = [sys.executable, str(ROOT / "eval.py"), "runs/digits", "--no_cuda"]
        draw(lines_of(run_in_terminal(typed, evaluation, folder).screen()), out / "screen_eval.png")
        if not photograph(folder / "runs" / "digits", out / "tensorboard.png"):
            sys.stderr.write(f"draw_screens: no {' or '.join(BROWSERS)}, or no selenium: tensorboard.png stays.\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
