"""Text whose bytes come from the world: names of files and folders in any encoding, or in none.

Python reads a byte that is no UTF-8 as a lone surrogate, which no file, protocol or terminal takes.
"""

import codecs
import os
import re
import sys
import unicodedata

ESCAPE = "escape"  # name of the error handler that `bytes.encode` and text files take; see `_escape`

_LOOKS_ESCAPED = re.compile(r"\\(?:\\|x[0-9a-f]{2}|u[0-9a-f]{4})")
_UNSHOWN = frozenset(("Cc", "Cs", "Zl", "Zp"))  # control characters, surrogates, separators of lines and paragraphs


def escaped(name: str | os.PathLike[str]) -> str:
    r"""A name as text that can be written anywhere, on one line: `se\xf1al.jpg` for the byte F1.

    A byte that is no UTF-8 becomes \xNN, and so does an ASCII control character; other control characters and
    separators of lines become \uNNNN. Nothing is lost: two names never become one, because the backslashes of a name
    with such an escape, or with what looks like one, are doubled. Every other name stays as it is.
    """
    text = os.fspath(name)
    shown = one_line(text)
    if shown == text and not _LOOKS_ESCAPED.search(text):
        return text
    return one_line(text.replace("\\", "\\\\"))


def one_line(text: str) -> str:
    r"""A message on one line that can be written anywhere; escapes as in `escaped`, backslashes left alone."""
    if text.isprintable():
        return text
    return "".join(_code(c) if unicodedata.category(c) in _UNSHOWN else c for c in text)


def _code(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # os.fsdecode's sign for a byte
        return f"\\x{number - 0xDC00:02x}"
    if number < 0x80:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _escape(error: UnicodeError) -> tuple[str, int]:
    """What an encoding cannot say, as `one_line` says it."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_code(character) for character in error.object[error.start : error.end]), error.end


codecs.register_error(ESCAPE, _escape)


def fit_streams() -> None:
    """From here on, whatever is printed fits the encodings of stdout and stderr (`LC_ALL=C`, `PYTHONIOENCODING`)."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=ESCAPE)
