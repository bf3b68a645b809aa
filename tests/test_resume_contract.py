"""The resume contract: every flag of every method says what a resumed run does with another value of it."""

from typing import Any

import pytest

from evaluation.options import EvalOptions
from method import methods
from parser_params import parse_config, resolve_config
from training.resume import changed_flags
from utils.errors import UserError
from utils.options import OF_CALL, SAME, TAKES, flags_of


def choices_of(method: str) -> dict[str, str | None]:
    return parse_config(["--method", method, "--dataset", "digits"]).resume_choices()


@pytest.mark.parametrize("method", methods.names())
def test_every_flag_says_what_a_resume_does_with_it(method: str) -> None:
    silent = [name for name, choice in choices_of(method).items() if choice is None]
    silent += [flag.name for flag in flags_of(EvalOptions) if flag.resume is None]
    assert not silent, f"no resume=... in their option(): {', '.join(silent)}"


def another(value: Any) -> Any:
    """A value that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, 1] if isinstance(value, list) else f"{value or ''}x"


@pytest.mark.parametrize("method", methods.names())
def test_every_flag_is_refused_said_or_of_the_call(method: str) -> None:
    config = resolve_config(parse_config(["--method", method, "--dataset", "digits"]), data_recipe="digits")
    before = config.values()
    choices = config.resume_choices()
    assert changed_flags(before, before, choices, config.origins) == []
    for name, value in before.items():
        now = {**before, name: another(value)}
        if choices[name] == SAME:
            with pytest.raises(UserError, match=f"--{name} .*not be the same run") as caught:
                changed_flags(before, now, choices, config.origins)
            assert "\n" not in str(caught.value)
            continue
        lines = changed_flags(before, now, choices, {name: "flag"})
        if choices[name] == OF_CALL:
            assert lines == []
        elif choices[name] == TAKES:
            assert lines[0].startswith(f"{name} ")
            assert lines[0].endswith(" (flag)")
        else:
            assert lines[0].endswith(f" (flag: {choices[name]})")
