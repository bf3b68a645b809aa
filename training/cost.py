"""What a run would cost, from one step, one evaluation batch and one checkpoint: `--dry_run`."""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from record.epoch_line import duration

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What was measured, and how much of it a run has.

    Attributes:
        steps, evaluations: that are left to do.
        step_seconds: of one training step, its images being there.
        evaluation_seconds: of an evaluation on all its images.
        memory_bytes: the most that this process has held: of the GPU's memory, or of the machine's.
        device: "cpu" or "cuda".
        checkpoint_bytes: of one checkpoint.
        checkpoints: files of that size in the run folder at the same time, the best one and one being written included.
        free_bytes: on the disk that the run folder would lie on.
    """

    steps: int
    evaluations: int
    step_seconds: float
    evaluation_seconds: float
    memory_bytes: int
    device: str
    checkpoint_bytes: int
    checkpoints: int
    free_bytes: int

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.steps * self.step_seconds + self.evaluations * self.evaluation_seconds

    @property
    def disk_bytes(self) -> int:
        """The most that its checkpoints take."""
        return self.checkpoints * self.checkpoint_bytes

    def as_dict(self) -> dict[str, Any]:
        """For the JSON line."""
        return {**vars(self), "seconds": self.seconds, "disk_bytes": self.disk_bytes}

    def text(self) -> str:
        """In three lines: time, memory, disk."""
        whose = "the GPU" if self.device == "cuda" else "this process (decoding processes come on top)"
        short = "" if self.disk_bytes <= self.free_bytes else ": too little"
        return "\n".join(
            (
                f"time: about {duration(self.seconds)} for {self.steps} steps of {self.step_seconds:.3g} s and "
                f"{self.evaluations} evaluations of {self.evaluation_seconds:.3g} s, if images come as fast",
                f"memory: {self.memory_bytes / GIB:.2f} GiB of {whose}",
                f"disk: {self.disk_bytes / GIB:.2f} GiB at most ({self.checkpoints} checkpoints of "
                f"{self.checkpoint_bytes / GIB:.3f} GiB); {self.free_bytes / GIB:.1f} GiB are free{short}",
            )
        )


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: of a GPU's memory, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def nearest_folder(path: Path) -> Path:
    """The path itself, or the first folder above it that is there."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.is_dir())
