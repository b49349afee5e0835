"""Numbers of a configuration must be numbers: NaN would pass every comparison that refuses what is too large."""

import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from bitnet_train.errors import ConfigError


def check_finite(node: Any, key: str = "") -> None:
    """Raises ConfigError for a number of a configuration, or of a part of it at ``key``, that is NaN or infinite."""
    if isinstance(node, float) and not math.isfinite(node):
        raise ConfigError(f"{key} is {node}; it must be a finite number.")
    inner: Iterable[tuple[str, Any]] = ()
    if is_dataclass(node):
        inner = ((f"{key}.{f.name}" if key else f.name, getattr(node, f.name)) for f in fields(node))
    elif isinstance(node, dict):
        inner = ((f"{key}.{name}" if key else str(name), value) for name, value in node.items())
    elif isinstance(node, list):
        inner = ((f"{key}[{number}]", value) for number, value in enumerate(node))
    for name, value in inner:
        check_finite(value, name)
