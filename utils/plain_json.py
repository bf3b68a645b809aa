"""Values as JSON can say them."""

import math
from collections.abc import Mapping
from typing import Any

from utils.text import escaped


def plain_json(value: Any) -> Any:
    """`value` with all that JSON cannot say replaced: non-finite numbers by None, tuples by lists, bytes in names."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_text(str(key)): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    return _text(value) if isinstance(value, str) else value


def _text(text: str) -> str:
    """A text as it is, unless it is a name of which not every byte is UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return escaped(text)
    return text
