"""Dataclass fields that are command-line flags: default, help and choices are written once, at the field."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError
from utils.registry import nearest_name


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: Sequence[Any] | None = None,
    aliases: Sequence[str] | Mapping[str, Mapping[str, str]] = (),
    default_text: str = "",
    metavar: str | None = None,
) -> Any:
    """A field of a frozen options dataclass that becomes the flag `--<field name>`.

    The field's annotation gives the type: `bool` takes 0/1/true/false, `X | None` may stay unset,
    `tuple[int, ...]` takes several values.

    Args:
        default: value where neither a flag, a YAML file nor a recipe gives one.
        help: meaning in one line; the parser adds default and unit.
        unit: what a number counts ("epochs", "pixels").
        choices: the accepted values.
        aliases: other spellings of the flag, without dashes. As a mapping, each with the values that are written
            otherwise there, as {"lr_type": {"cosine": "epoch_cos"}}: that spelling then takes these values only.
        default_text: what --help prints as the default where the value alone would mislead ("recipe").
        metavar: what --help prints in place of the value.
    """
    metadata = {
        "help": help,
        "unit": unit,
        "choices": None if choices is None else tuple(choices),
        "aliases": aliases if isinstance(aliases, Mapping) else {name: {} for name in aliases},
        "default_text": default_text,
        "metavar": metavar,
    }
    return dataclasses.field(default=default, metadata=metadata)


def _to_bool(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected 0 or 1")


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
    aliases: Mapping[str, Mapping[str, str]]
    default_text: str
    metavar: str | None

    def parse(self, value: Any, where: str, spelling: str = "") -> Any:
        """Typed value of what a command line or a YAML file gave under the flag's own name or an alias.

        Raises:
            UserError: wrong type or not one of the choices; `where` names the flag or the file and key.
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
                return tuple(_convert_one(self.element, text) for text in texts)
            if isinstance(value, list | tuple | dict):
                raise ValueError(f"expected {self.expected()}")
            converted = _convert_one(self.element, str(value))
        except ValueError as error:
            raise UserError(f"{where}: {value!r} is not usable: {error}.") from None
        if self.choices is not None and converted not in self.choices:
            near = nearest_name(str(converted), map(str, self.choices))
            raise UserError(f"{where}: {converted!r} is not one of {', '.join(map(str, self.choices))}.{near}")
        return converted

    def expected(self) -> str:
        """What kind of value the flag takes, in words."""
        words = {bool: "0 or 1", int: "a whole number", float: "a number", str: "a text"}
        return words.get(self.element, "a value") + (" or several" if self.several else "")


def flags_of(options: type) -> list[Flag]:
    """The flags that the fields of an options dataclass stand for (inherited fields left out for sections)."""
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
                **{k: item.metadata[k] for k in ("help", "unit", "choices", "aliases", "default_text", "metavar")},
            )
        )
    return flags
