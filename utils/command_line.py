"""A command line and a YAML file as text, before anybody knows what the flags mean."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from utils.errors import UserError, reason
from utils.options import Flag


class FlagParser(argparse.ArgumentParser):
    """Argument parser whose errors are UserErrors instead of exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.replace("argument ", "", 1) + f". See {self.prog} --help.")


class OneLineParser(argparse.ArgumentParser):
    """Argument parser of a small program: a wrong flag is one line on stderr and exit code 2, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(UserError.exit_code, f"{self.prog}: {message.removeprefix('argument ')}\n")


def at_least(least: int) -> Callable[[str], int]:
    """Type of a small program's flag: a whole number from `least` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
        return int(text)

    return number


def above_zero(text: str) -> float:
    """Type of a small program's flag: a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def several_at_least(least: int) -> Callable[[str], list[int]]:
    """The same for a comma list."""
    number = at_least(least)
    return lambda text: [number(part.strip()) for part in text.split(",")]


@dataclass(frozen=True)
class _Bare:
    """Stands for the value of a flag that was given without one."""

    meaning: str


class _Store(argparse.Action):
    """Keep the spelling with the value; a bare flag does not undo a value that another spelling gave."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        assert option_string is not None
        if not isinstance(values, _Bare):
            setattr(namespace, self.dest, (option_string.lstrip("-"), values))
        elif not hasattr(namespace, self.dest):
            setattr(namespace, self.dest, (option_string.lstrip("-"), values.meaning))


def _help_text(flag: Flag) -> str:
    default: Any = flag.default_text
    if not default:
        default = {True: 1, False: 0, None: "none"}.get(flag.default, flag.default) if flag.default != () else "none"
    unit = f", in {flag.unit}" if flag.unit else ""
    accepted = ", ".join(map(str, flag.choices)) if flag.choices else str(flag.range)
    return f"{flag.help}{f' ({accepted})' if accepted else ''}{unit} [default: {default}]".replace("%", "%%")


def add_flags(parser: FlagParser, title: str, flags: Sequence[Flag]) -> None:
    """A group of flags under a title, each with its help; what is not given leaves nothing in the namespace."""
    group = parser.add_argument_group(title)
    for flag in flags:
        extra: dict[str, Any] = {}
        if flag.several:
            extra["nargs"] = "+"
        elif flag.bare is not None:
            extra.update(nargs="?", const=_Bare(flag.bare))
        words = {bool: "0|1", int: "N", float: "X", str: "NAME"}
        names = [f"--{name}" for name in (flag.name, *flag.aliases)]
        group.add_argument(
            *names,
            action=_Store,
            dest=flag.name,
            default=argparse.SUPPRESS,
            help=_help_text(flag),
            metavar=flag.metavar or words.get(flag.element, "VALUE"),
            **extra,
        )


def with_underscores(argument: str) -> str:
    """`--feat-dim=8` as `--feat_dim=8`; what is no flag stays."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def early_value(argv: Sequence[str], name: str) -> str | None:
    """Last value of `--name VALUE` or `--name=VALUE` on a command line, before the parser exists."""
    found = None
    for i, token in enumerate(argv):
        if token == f"--{name}" and i + 1 < len(argv):
            found = argv[i + 1]
        elif token.startswith(f"--{name}="):
            found = token.split("=", 1)[1]
    return found


def last_pairs(argv: Sequence[str]) -> list[str]:
    """The KEY VALUE pairs at the end of a command line, before the parser exists."""
    end = len(argv)
    while end >= 2 and not any(token.startswith("--") for token in argv[end - 2 : end]):
        end -= 2
    return list(argv[end:])


def fenced(argv: Sequence[str], early: Sequence[str], is_key: Callable[[str], bool]) -> list[str]:
    """The command line with `--` before its overrides, so that a flag with any number of values takes none of them."""
    for place in range(len(argv) - len(early), len(argv), 2):
        if is_key(argv[place]):
            return [*argv[:place], "--", *argv[place:]]
    return list(argv)


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: unreadable, not YAML, not a mapping of names to values, or with a name that stands there twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        aliases = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader))
        content = yaml.safe_load(text)
        root = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror or error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: is not valid YAML: {reason(error)}") from None
    if content is None:
        return {}
    if aliases:
        raise UserError(f"--config {path}: YAML's aliases (*name) are not read: a few of them make any size.")
    if not isinstance(root, yaml.MappingNode) or not all(isinstance(key, str) for key in content):
        raise UserError(f"--config {path}: expected 'flag: value' lines, found {type(content).__name__}.")
    keys = [key.value for key, _ in root.value]
    for key in content:
        if keys.count(key) > 1:  # YAML itself would silently take the last one
            raise UserError(f"--config {path}: {key!r} stands there {keys.count(key)} times; keep one.")
    return content
