"""Growing a file by whole pieces."""

import contextlib
import io
import os


def append_whole(file: io.FileIO, content: bytes) -> None:
    """Append all of `content` to an unbuffered file or, where it does not fit, nothing of it.

    Raises:
        OSError: the disk is full, the file cannot be written.
    """
    start = file.seek(0, os.SEEK_END)
    try:
        while content:
            content = content[file.write(content) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(start)
        raise
