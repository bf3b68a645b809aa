"""Dataclass fields that are command-line flags: default, help, choices and range are written once, at the field."""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError
from utils.registry import nearest_name

BY_RECIPE = "set by the recipe"  # default_text of what the published recipes decide

# What a resumed run does with another value than the run before had.
SAME = "refused"  # it would not be the same run
TAKES = "takes effect"  # and is said
SWITCH = ("0", "1", "auto")  # choices of a flag that may decide by itself
OF_CALL = "of this call"  # where and how a program runs; the run is the same


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a flag takes; each bound may be open.

    Attributes:
        least, most: smallest and largest number.
        above, below: the same, themselves left out.
        count: how many numbers; None: one, or any number of them where the flag takes several.
        ascending: each at least as large as the one before.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    count: int | None = None
    ascending: bool = False

    def __bool__(self) -> bool:
        return self != Range()

    def __str__(self) -> str:
        one = self._of_one()
        if self.count is None:
            return one
        words = f"{_NUMBER_WORDS.get(self.count, self.count)} numbers{', each ' + one if one else ''}"
        return words + (", the smaller first" if self.ascending else "")

    def _of_one(self) -> str:
        if self.least is not None and self.most is not None:
            return f"between {self.least} and {self.most}"
        words = [f"{self.least} or more"] if self.least is not None else []
        words += [f"above {self.above}"] if self.above is not None else []
        words += [f"at most {self.most}"] if self.most is not None else []
        words += [f"below {self.below}"] if self.below is not None else []
        return " and ".join(words)

    def holds(self, value: Any) -> bool:
        """Whether a number, or each of several, lies within the bounds; NaN and infinity lie nowhere."""
        values = value if isinstance(value, tuple | list) else (value,)
        return (
            (self.count is None or len(values) == self.count)
            and all(map(self._holds_one, values))
            and not (self.ascending and list(values) != sorted(values))
        )

    def _holds_one(self, value: float) -> bool:
        return is_finite(value) and not (
            (self.least is not None and value < self.least)
            or (self.most is not None and value > self.most)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )


def is_finite(value: float) -> bool:
    """Whether a float can hold the number."""
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


_NUMBER_WORDS = {2: "two", 3: "three"}


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: Sequence[Any] | None = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    count: int | None = None,
    ascending: bool = False,
    aliases: Sequence[str] | Mapping[str, Mapping[str, str]] = (),
    bare: str | None = None,
    resume: str | None = None,
    default_text: str = "",
    metavar: str | None = None,
) -> Any:
    """A field of a frozen options dataclass that becomes the flag `--<field name>`.

    The field's annotation gives the type: `bool` takes 0/1/true/false, `X | None` may stay unset,
    `tuple[int, ...]` takes several values.

    Args:
        default: value where neither a flag, a YAML file nor a recipe gives one. None, and an empty tuple, mean that
            nobody has said anything: no range holds them.
        help: meaning in one line; the parser adds default, range and unit.
        unit: what a number counts ("epochs", "pixels").
        choices: the accepted values.
        least, most, above, below, count, ascending: the accepted numbers, see `Range`.
        aliases: other spellings of the flag, without dashes. As a mapping, each with the values that are written
            otherwise there, as {"lr_type": {"cosine": "epoch_cos"}}: that spelling then takes these values only.
        bare: what the flag means without a value; None: it needs one.
        resume: what a resumed run does with another value than the run before had: SAME, TAKES, OF_CALL, or in words
            what happens. Every flag of the programs must say it; a test walks them.
        default_text: what --help prints as the default where the value alone would mislead ("recipe").
        metavar: what --help prints in place of the value.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "choices": None if choices is None else tuple(choices),
        "range": Range(least=least, most=most, above=above, below=below, count=count, ascending=ascending),
        "aliases": aliases if isinstance(aliases, Mapping) else {name: {} for name in aliases},
        "bare": bare,
        "resume": resume,
        "default_text": default_text,
        "metavar": metavar,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of every options dataclass: no value outside of its field's choices or range can stand in one.

    Raises:
        UserError: such a value; the line names the flag.
    """

    def __post_init__(self) -> None:
        kind: type = type(self)
        for flag in flags_of(kind):
            flag.check(getattr(self, flag.name), f"--{flag.name}")


_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def _to_bool(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise ValueError("expected 0 or 1")


def _as_switch(text: str) -> str:
    """A choice of SWITCH, which may be written as a bool is; another text stays as it is."""
    lowered = text.strip().lower()
    return "1" if lowered in _TRUE else "0" if lowered in _FALSE else lowered


def _value_type(annotation: Any) -> tuple[type, bool, bool]:
    """(element type, may be None, is a tuple) of a field's annotation."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (inner,) = (a for a in typing.get_args(annotation) if a is not type(None))
        element, _, several = _value_type(inner)
        return element, True, several
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], False, True
    return annotation, False, False


def _convert_one(element: type, text: str) -> Any:
    if element is bool:
        return _to_bool(text)
    if element is int:
        try:
            return int(text)
        except ValueError:
            raise ValueError("expected a whole number") from None
    if element is float:
        try:
            return float(text)
        except ValueError:
            raise ValueError("expected a number") from None
    return text


@dataclass(frozen=True)
class Flag:
    """One field seen as a flag: how to read its value from text or from YAML."""

    name: str
    element: type
    optional: bool
    several: bool
    default: Any
    help: str
    unit: str
    choices: tuple[Any, ...] | None
    range: Range
    aliases: Mapping[str, Mapping[str, str]]
    bare: str | None
    resume: str | None
    default_text: str
    metavar: str | None

    def parse(self, value: Any, where: str, spelling: str = "") -> Any:
        """Typed value of what a command line or a YAML file gave under the flag's own name or an alias.

        Raises:
            UserError: wrong type, or outside of choices or range; `where` names the flag or the file and key.
        """
        ours = self.aliases.get(spelling)
        if ours:
            if str(value) not in ours:
                raise UserError(f"{where}: {value!r} is not one of {', '.join(ours)}.{nearest_name(str(value), ours)}")
            value = ours[str(value)]
        if value is None or (self.optional and isinstance(value, str) and value.lower() in ("none", "null")):
            if self.optional:
                return None
            raise UserError(f"{where}: a value is missing; expected {self.expected()}.")
        try:
            if self.several:
                parts = value if isinstance(value, list | tuple) else [value]
                texts = [t for part in parts for t in str(part).replace(",", " ").split()]
                converted: Any = tuple(_convert_one(self.element, text) for text in texts)
            elif isinstance(value, list | tuple | dict):
                raise ValueError(f"expected {self.expected()}")
            else:
                converted = _convert_one(self.element, str(value))
        except ValueError as error:
            raise UserError(f"{where}: {value!r} is not usable: {error}.") from None
        if self.choices == SWITCH:
            converted = _as_switch(converted)
        self.check(converted, where)
        return converted

    def check(self, value: Any, where: str) -> None:
        """Refuse a value that is not one of the choices or not in the range, wherever it comes from.

        Raises:
            UserError: the line names `where`.
        """
        if value is None or (value == () and self.default == ()):
            return
        if self.choices is not None and value not in self.choices:
            near = nearest_name(str(value), map(str, self.choices))
            raise UserError(f"{where}: {value!r} is not one of {', '.join(map(str, self.choices))}.{near}")
        if self.range and not self.range.holds(value):
            values = value if isinstance(value, tuple | list) else (value,)
            shown = " ".join(map(str, values))[:60] or "none"
            endless = "" if all(map(is_finite, values)) else ", which is not finite"
            raise UserError(f"{where} must be {self.range}, got {shown}{endless}.")

    def expected(self) -> str:
        """What kind of value the flag takes, in words."""
        words = {bool: "0 or 1", int: "a whole number", float: "a number", str: "a text"}
        return words.get(self.element, "a value") + (" or several" if self.several else "")


@functools.cache
def flags_of(options: type) -> tuple[Flag, ...]:
    """The flags that the fields of an options dataclass stand for."""
    hints = typing.get_type_hints(options)
    flags = []
    for item in dataclasses.fields(options):
        if "help" not in item.metadata:
            continue
        element, optional, several = _value_type(hints[item.name])
        flags.append(
            Flag(
                name=item.name,
                element=element,
                optional=optional,
                several=several,
                default=item.default,
                **item.metadata,
            )
        )
    return tuple(flags)
