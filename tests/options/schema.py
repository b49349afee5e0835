"""Every field that the configuration has, those of all variants and of the items of lists included."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from bitnet_train.config import KINDS, VARIANTS, Config


def every_field() -> list[str]:
    """Names such as ``quant.weight.bits``, ``clip=norm.max_norm`` (of a variant), ``optimizer=muon.groups[].lr``."""
    return list(_fields(Config, "", ""))


def _fields(kind: Any, name: str, key: str) -> Iterator[str]:
    hints = get_type_hints(kind)
    of_variant = name.endswith("]") is False and "=" in name.rpartition(".")[2]
    for field in fields(kind):
        if field.name == "name" and of_variant:
            continue  # tells the variant and cannot be set
        inner_name = f"{name}.{field.name}" if name else field.name
        inner_key = f"{key}.{field.name}" if key else field.name
        options = (KINDS | VARIANTS).get(inner_key)
        if options is not None:
            for option, variant in options.items():
                yield from _fields(variant, f"{inner_name}={option}", inner_key)
            continue
        item = _item(hints[field.name])
        if is_dataclass(hints[field.name]):
            yield from _fields(hints[field.name], inner_name, inner_key)
        elif item is not None:
            yield from _fields(item, f"{inner_name}[]", inner_key)
        else:
            yield inner_name


def _item(hint: Any) -> Any:
    """The dataclass that a list, or a list or null, holds."""
    if get_origin(hint) in (Union, UnionType):
        return next((found for found in map(_item, get_args(hint)) if found is not None), None)
    if get_origin(hint) is list and is_dataclass(get_args(hint)[0]):
        return get_args(hint)[0]
    return None
