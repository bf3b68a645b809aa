"""Names the packages of requirements.txt and of groups of pyproject.toml that this Python lacks; exit code 1 if any."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def wanted_packages(groups: list[str]) -> list[tuple[str, tuple[int, ...]]]:
    """(name, lowest version) of everything asked for."""
    lines = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for group in groups:
        lines += project["dependency-groups"][group]
    split = [re.split(r">=", line) for line in lines if line]
    return [(name, tuple(map(int, version[0].split("."))) if version else ()) for name, *version in split]


def is_missing(name: str, lowest: tuple[int, ...]) -> bool:
    """Whether a package is not installed, or too old."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return True
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3]) < lowest


if __name__ == "__main__":
    missing = [name for name, lowest in wanted_packages(sys.argv[1:]) if is_missing(name, lowest)]
    if missing:
        print(f"installing {', '.join(missing)} …", file=sys.stderr)
    sys.exit(bool(missing))
