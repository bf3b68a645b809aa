"""Values as JSON can say them."""

import math
from collections.abc import Mapping
from typing import Any


def plain_json(value: Any) -> Any:
    """`value` with everything that JSON cannot say replaced: non-finite numbers by None, tuples by lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    return value
