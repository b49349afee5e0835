"""Values that no setting can have, whatever it is for, and that OmegaConf lets through."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from bitnet_train.errors import ConfigError

WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def check_finite(cfg: Any, key: str = "") -> None:
    """Raises ConfigError for a number of a configuration, or of a part of it at ``key``, that is NaN or infinite.

    NaN would pass every comparison that refuses what is too large.
    """
    for name, value in _numbers(cfg, key):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} is {value}; it must be a finite number.")


def check_sizes(cfg: Any) -> None:
    """Raises ConfigError for the first setting that is a whole number beyond 64 bits."""
    for name, value in _numbers(cfg, ""):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ConfigError(f"{name} is {value}, which does not fit into 64 bits: give a smaller number.")


def _numbers(part: Any, name: str) -> Iterator[tuple[str, Any]]:
    inner: Iterable[tuple[str, Any]] = ()
    if is_dataclass(part):
        inner = ((f"{name}.{f.name}" if name else f.name, getattr(part, f.name)) for f in fields(part))
    elif isinstance(part, dict):
        inner = ((f"{name}.{key}" if name else str(key), value) for key, value in part.items())
    elif isinstance(part, list):
        inner = ((f"{name}[{number}]", value) for number, value in enumerate(part))
    elif isinstance(part, int | float):
        yield name, part
    for key, value in inner:
        yield from _numbers(value, key)


def check_lists(cfg: Any, name: str = "") -> None:
    """Raises ConfigError for a list, or a mapping, whose items are not of the declared type: OmegaConf takes a list in
    the place of a number there.
    """
    hints = _hints(cfg.__class__)
    for field in fields(cfg):
        value, inner = getattr(cfg, field.name), f"{name}.{field.name}" if name else field.name
        if is_dataclass(value):
            check_lists(value, inner)
        elif isinstance(value, list | dict):
            _check_items(value, hints[field.name], inner)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _check_items(value: Any, hint: Any, name: str) -> None:
    declared = next((h for h in (hint, *get_args(hint)) if get_origin(h) is type(value)), None)
    if declared is None:
        return
    wanted = get_args(declared)[-1]
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        place = f"{name}.{key}" if isinstance(value, dict) else f"{name}[{key}]"
        if is_dataclass(item):
            check_lists(item, place)
        elif isinstance(item, list | dict) and wanted in WORDS:
            raise ConfigError(f"{place} must be {WORDS[wanted]}, not {item}.")
        elif get_origin(wanted) in (list, dict):
            if not isinstance(item, get_origin(wanted)):
                raise ConfigError(f"{place} must be a list, not {item}.")
            _check_items(item, wanted, place)
        elif item is None and wanted in WORDS:
            raise ConfigError(f"{place} must be {WORDS[wanted]}, not null.")
