"""Pictures for the documents of what a user sees: a short training and an evaluation in a real terminal, TensorBoard.

`python -m script.draw_screens [--out miscs]` trains two small networks on digits in a pseudo-terminal, draws what the
terminal shows as `screen_train.png` and `screen_eval.png`, and has a headless Chromium photograph TensorBoard's page as
`tensorboard.png`, where there is one. Needs pyte (pyproject.toml, group dev).
"""

import os
import pty
import select
import termios
import threading

import pyte


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
