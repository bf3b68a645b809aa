"""Dataclass fields that are command-line flags: default, help and choices are written once, at the field."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


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
