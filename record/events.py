"""TensorBoard's event files, written by the caller's thread: torch's SummaryWriter has one of its own, whose errors (a
full disk) nobody can catch. Slow to import.
"""

import io
import itertools
import os
import socket
import time
import weakref
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from record.append import append_whole

_NUMBER = itertools.count()


class EventFile:
    """A new event file.

    Args:
        folder: made if it is not there; TensorBoard reads the files in it as one, in the order of their names.
        purge_step: TensorBoard drops what older files hold from this step on; None: nothing.

    Raises:
        OSError: it cannot be written; no method leaves half a record.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBER)}"
        self._file = (folder / name).open("ab", buffering=0)
        self._close = weakref.finalize(self, self._file.close)  # also where a run is dropped before its end
        self._append(Event(wall_time=now, file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._append(Event(wall_time=now, step=purge_step, session_log=start))

    def add(self, summary: Summary, step: int) -> None:
        """Write what one of `torch.utils.tensorboard.summary`'s functions made."""
        self._append(Event(wall_time=time.time(), step=step, summary=summary))

    def _append(self, event: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        append_whole(self._file, record.getvalue())

    def close(self) -> None:
        """Close the file."""
        self._close()
