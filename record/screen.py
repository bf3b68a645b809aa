"""stderr as a screen: lines of the log, and on a terminal one line below them that is drawn again and again."""

import logging
import os
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

USUAL_COLUMNS = 80  # of a terminal that does not say how wide it is
DRAW_SECONDS = 0.1  # between two drawings of a bar
WIDEST_BAR = 40
NARROWEST_BAR = 8
ERASE = "\r\x1b[K"

T = TypeVar("T")


def stderr_is_terminal() -> bool:
    """True where stderr is a terminal, so that a line can be drawn again."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") != "dumb"


def terminal_columns() -> int:
    """Width of the terminal that stderr is; one that does not know has 80 columns."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or USUAL_COLUMNS
    except (OSError, ValueError):
        return USUAL_COLUMNS


class Screen(logging.StreamHandler):
    """Writes log records to stderr; on a terminal above the line of a `Bar`.

    What is longer than a line of a terminal is broken there at blanks. A record may carry `forms`, its text from the
    longest to the shortest: a terminal shows the longest that fits on one line. One that carries `in_bar` is left out
    where a bar shows the same.

    Args:
        shared: other processes draw on the same terminal.
    """

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__(sys.stderr)
        self.is_terminal = stderr_is_terminal()
        self._shared = shared
        self._bottom = ""

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record; see the class."""
        forms: Sequence[str] | None = getattr(record, "forms", None)
        text, columns = super().format(record), terminal_columns()
        if not self.is_terminal or len(text) < columns:
            return text
        if forms is not None:
            text = next((form for form in forms if len(form) < columns), forms[-1])
        # at blanks, which a terminal does not care for
        return textwrap.fill(text, columns - 1, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record above the line at the bottom."""
        bottom = self._bottom
        if bottom and getattr(record, "in_bar", False):
            return
        if bottom or (self._shared and self.is_terminal):
            self._put(ERASE)
        super().emit(record)
        if bottom:
            self._put(bottom)

    def draw(self, text: str) -> None:
        """Show a text in the line at the bottom, or with "" no such line any more."""
        if not self.is_terminal:
            return
        with self.lock:  # type: ignore[union-attr]  # every handler has made one
            text = text[: terminal_columns() - 1]  # a full line would wrap on some terminals
            if text or self._bottom:
                self._put(ERASE + text)
            self._bottom = text

    def _put(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):  # the terminal is gone
            self.is_terminal, self._bottom = False, ""


def screen() -> Screen | None:
    """The terminal that log records go to, if they go to one."""
    found = (handler for handler in logging.getLogger().handlers if isinstance(handler, Screen))
    return next((handler for handler in found if handler.is_terminal), None)


class Bar:
    """How much of something is done, in the line below the log; nothing where nobody watches."""

    def __init__(self, *, visible: bool = True) -> None:
        self._screen = screen() if visible else None
        self._drawn = -DRAW_SECONDS

    def is_due(self) -> bool:
        """Whether it is shown, and was last drawn long enough ago."""
        return self._screen is not None and time.monotonic() - self._drawn >= DRAW_SECONDS

    def draw(self, title: str, share: float, note: str = "") -> None:
        """Show it.

        Args:
            title, note: before and behind the bar.
            share: done of all, in [0, 1].
        """
        if self._screen is not None:
            self._drawn = time.monotonic()
            self._screen.draw(bar_text(title, share, note, terminal_columns() - 1, _encoding_has_blocks()))

    def close(self) -> None:
        """Remove it from the screen."""
        if self._screen is not None:
            self._screen.draw("")


def bar_text(title: str, share: float, note: str, columns: int, blocks: bool) -> str:
    """`title ██████░░░░  60 %  note` in at most so many columns: without the note, then without the bar, if need be."""
    filled, empty = "█░" if blocks else "#."
    for end in (f" {100 * share:3.0f} %  {note}".rstrip(), f" {100 * share:3.0f} %"):
        width = min(columns - len(title) - 1 - len(end), WIDEST_BAR)
        if width >= NARROWEST_BAR:
            done = int(width * min(max(share, 0.0), 1.0))
            return f"{title} {filled * done}{empty * (width - done)}{end}"
    return f"{title}{end}"[:columns]


def _encoding_has_blocks() -> bool:
    try:
        "█░".encode(sys.stderr.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def watched(items: Iterable[T], count: int, title: str, *, visible: bool = True) -> Iterator[T]:
    """The items of a pass, with a bar where somebody watches.

    Args:
        count: how many there will be.
        visible: False in all processes but one.
    """
    bar = Bar(visible=visible)
    try:
        for number, item in enumerate(items):
            if bar.is_due():
                bar.draw(title, number / max(count, 1))
            yield item
    finally:
        bar.close()
