"""Shell scripts run with something that stands for Python: which commands they start, without running them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class StubPython:
    """A script and the stub.

    Attributes:
        script: a file of script/.
        folder: where it is started; holds the stub and its log.
        settings: variables that the script reads; none of them is passed on.
    """

    script: str
    folder: Path
    settings: Sequence[str]

    @classmethod
    def write(cls, script: str, folder: Path, settings: Sequence[str], stub: str, **values: str) -> "StubPython":
        """The stub is Python with {python}, {log} and further values in place; it appends a line of JSON to the log."""
        path = folder / "python"
        path.write_text(stub.format(python=sys.executable, log=str(folder / "log"), **values))
        path.chmod(0o755)
        return cls(script, folder, settings)

    def __call__(self, *words: str) -> tuple[list[list[str]], "subprocess.CompletedProcess[str]"]:
        """(the commands that the script started, how it ended)."""
        log = self.folder / "log"
        log.write_text("")
        environment = {name: value for name, value in os.environ.items() if name not in (*self.settings, "DRY_RUN")}
        done = subprocess.run(
            [ROOT / "script" / self.script, *words],
            env=environment | {"PYTHON": str(self.folder / "python")},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        return [json.loads(line) for line in log.read_text().splitlines()], done
