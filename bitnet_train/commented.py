"""``--cfg job``: the composed configuration as YAML, above every setting the comment that explains it in the code."""

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf

WIDTH = 110
LEAST_WIDTH = 40


def commented(node: DictConfig, resolve: bool = False) -> str:
    """``node`` as Hydra prints it, with comments; ``resolve`` puts values in the place of interpolations.

    A list of settings that is empty is explained by the settings that an item of it may have.
    """
    text = OmegaConf.to_yaml(node, resolve=resolve)
    lines = text.splitlines(keepends=True)
    above: dict[int, list[str]] = {}
    for line, kind, name in _settings(yaml.compose(text), node):
        indent = " " * (len(lines[line]) - len(lines[line].lstrip(" ")))
        above[line] = [f"{indent}{comment}\n" for comment in _above(kind, name, len(indent))]
    return "".join(line for number, one in enumerate(lines) for line in (*above.get(number, []), one))


def _settings(place: yaml.Node, node: Any) -> Iterator[tuple[int, type, str]]:
    """Line, dataclass and name of every setting of ``node``, whose YAML ``place`` is."""
    kind = OmegaConf.get_type(node)
    if not isinstance(place, yaml.MappingNode) or not is_dataclass(kind):
        return
    for key, value in place.value:
        yield key.start_mark.line, kind, key.value
        child = node._get_node(key.value)
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing() or child._is_interpolation()):
            yield from _settings(value, child)


def _above(kind: type, name: str, indent: int) -> list[str]:
    lines = _wrapped(comment_of(kind, name), indent)
    item = _item(kind, name)
    if item is not None:
        lines += _wrapped(f"Each item of {name} has:", indent)
        told: list[tuple[str, str]] = []
        for f in fields(item):
            comment = comment_of(item, f.name)
            if told and not comment:  # the comment above several fields is for all of them
                told[-1] = f"{told[-1][0]}, {f.name}", told[-1][1]
            else:
                told.append((f.name, comment))
        for names, comment in told:
            lines += _wrapped(f"  {names}: {comment}", indent)
    return lines


def _wrapped(text: str, indent: int) -> list[str]:
    inner = " " * (len(text) - len(text.lstrip(" ")))
    width = max(LEAST_WIDTH, WIDTH - indent - 2)
    further = f"{inner}  " if inner else ""
    wrapped = textwrap.wrap(text.strip(), width, initial_indent=inner, subsequent_indent=further)
    return [f"# {line}" for line in wrapped]


def _item(kind: type, name: str) -> Any:
    """The dataclass of the items of a list of settings, or None."""
    hint = get_type_hints(kind).get(name)
    inner = [part for one in (hint, *get_args(hint)) if get_origin(one) in (list, dict) for part in get_args(one)]
    return next((part for part in inner if is_dataclass(part)), None)


@cache
def comment_of(kind: type, name: str) -> str:
    """What the code says of a field of a config dataclass: the comment above it, or else what its type says of itself;
    "" where neither says anything. ``name`` stands for the kind itself."""
    if name == "name":
        return _first_paragraph(kind.__doc__)
    for owner in kind.__mro__:
        if is_dataclass(owner):
            found = _comments(owner).get(name)
            if found:
                return found
    declared = get_type_hints(kind).get(name)
    own = declared if is_dataclass(declared) else None
    return _first_paragraph(own.__doc__) if own is not None else ""


def _first_paragraph(text: str | None) -> str:
    plain = inspect.cleandoc(text or "").split("\n\n")[0]
    # A dataclass without a docstring has its signature for one.
    return "" if re.match(r"\w+\(", plain) else " ".join(plain.split())


@cache
def _comments(kind: type) -> dict[str, str]:
    """Field -> the comment above it, in the class itself or, for ``from``, which is no name in Python, behind it."""
    found: dict[str, str] = {}
    module = inspect.getsource(sys.modules[kind.__module__])
    added = rf'^{kind.__name__}\.__annotations__\["(\w+)"\]'
    for source, field in ((inspect.getsource(kind), r"^    (\w+):"), (module, added)):
        comment: list[str] = []
        for line in source.splitlines():
            named = re.match(field, line)
            if line.lstrip().startswith("#"):
                comment.append(line.strip().lstrip("#").strip())
                continue
            if named and comment:
                found.setdefault(named[1], " ".join(comment))
            comment = []
    return found
