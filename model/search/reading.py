"""Architectures and search spaces from text and YAML, and back."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from model.search.costs import Operator
from model.search.space import PUBLISHED, Arch, SearchSpace, Stage
from utils.errors import UserError
from utils.registry import nearest_name


def parse_arch_list(text: str | Arch, space: SearchSpace = PUBLISHED) -> tuple[tuple[int, ...], ...]:
    """An arch from text such as "[[0],[3],[3,3],[3,1,3],[3,3,3,3],[3,3,3],[0]]", or from nested lists.

    Raises:
        UserError: not a list of lists of whole numbers, or no arch of the space.
    """
    try:
        value = json.loads(text) if isinstance(text, str) else text
        if not all(type(index) is int for stage in value for index in stage):
            raise TypeError
    except (TypeError, ValueError, RecursionError):
        raise UserError(
            f"--arch_list {text!r}: expected a list of lists of whole numbers, as [[0],[3,3],[0]]."
        ) from None
    arch = tuple(tuple(stage) for stage in value)
    space.check_arch(arch)
    return arch


def _whole(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r}: every number must be whole and at least 1")
    return value


def space_from_mapping(mapping: Mapping[str, Any], where: str) -> SearchSpace:
    """A space from the keys of `SearchSpace`: operators [kernel, expansion], stages {channels, stride, template}.

    Args:
        mapping: parsed YAML.
        where: the flag and file, for messages.

    Raises:
        UserError: an unknown, missing or unusable key.
    """
    fields = [field.name for field in dataclasses.fields(SearchSpace)]
    for key in mapping:
        if key not in fields:
            raise UserError(f"{where}: {key!r} is not a key of a search space.{nearest_name(str(key), fields)}")
    lost = [name for name in fields if name not in mapping]
    if lost:
        raise UserError(f"{where}: the search space lacks {', '.join(lost)}.")
    try:
        operators = tuple(Operator(_whole(kernel), _whole(expansion)) for kernel, expansion in mapping["operators"])
        stages = tuple(
            Stage(**{**stage, "template": Operator(*stage["template"]) if stage.get("template") else None})
            for stage in mapping["stages"]
        )
        deepening = tuple((_whole(stage), _whole(cap)) for stage, cap in mapping["deepening"])
        numbers = {name: _whole(mapping[name]) for name in fields[3:]}
        templates = [stage.template for stage in stages if stage.template]
        for number in (n for stage in stages for n in (stage.channels, stage.stride)):
            _whole(number)
        for number in (n for op in templates for n in (op.kernel, op.expansion)):
            _whole(number)
        if not operators or not stages:
            raise ValueError("operators and stages are needed")
        if any(op.kernel % 2 == 0 for op in (*operators, *templates)):
            raise ValueError("kernels must be odd")
        if any(stage > len(stages) for stage, _ in deepening):
            raise ValueError(f"deepening names a stage beyond the {len(stages)} there are")
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{where}: {error}; see model/search/reading.py for the form of a search space.") from None
    return SearchSpace(operators, stages, deepening, **numbers)


def space_to_text(space: SearchSpace) -> str:
    """The space as one line that `read_space` takes."""
    return json.dumps(
        {
            **dataclasses.asdict(space),
            "operators": [[op.kernel, op.expansion] for op in space.operators],
            "stages": [
                {"channels": stage.channels, "stride": stage.stride}
                | ({"template": [stage.template.kernel, stage.template.expansion]} if stage.template else {})
                for stage in space.stages
            ],
        }
    )


def read_space(text: str) -> SearchSpace:
    """A space from the value of --search_space: the path of a YAML file, or the YAML itself.

    Raises:
        UserError: unreadable, or as `space_from_mapping`.
    """
    where = "--search_space"
    inline = "\n" in text.strip() or text.lstrip().startswith("{")
    try:
        if not inline:
            where = f"--search_space {text}"
            text = Path(text).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror or error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected the keys of a search space, found {type(content).__name__}.")
    return space_from_mapping(content, where)
