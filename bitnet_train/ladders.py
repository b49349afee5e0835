"""Ladders: families of recipes that differ in size alone, one YAML file each in recipes/ladders/.

A file has the ``defaults`` of all its recipes, their common ``settings``, the names of the ``columns`` of its table,
and the ``sizes``: recipe ``<file>_<size>`` is the settings with a row of the table put in.
"""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from bitnet_train.errors import ConfigError

# Column -> where its value goes. The two rates of a linear decay with a drop at half become stages.
COLUMNS = {
    "hidden": "model.hidden",
    "ffn": "model.ffn",
    "heads": "model.heads",
    "kv_heads": "model.kv_heads",
    "layers": "model.layers",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "first_lr": "optimizer.lr",
    "second_lr": "",
}
KEYS = {"defaults", "settings", "columns", "sizes", "decay_off_at_half"}


@cache
def read_ladder(path: Path) -> dict[str, DictConfig]:
    """The recipes of a ladder file by name, not to be changed. Raises ConfigError when it is none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows = {size: dict(zip(content["columns"], row, strict=True)) for size, row in content["sizes"].items()}
        unknown = (set(content) - KEYS) | (set(content["columns"]) - set(COLUMNS))
        defaults, settings = content["defaults"], content["settings"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is no ladder of recipes ({type(error).__name__}: {error}).") from None
    if unknown:
        raise ConfigError(f"{path}: '{sorted(map(str, unknown))[0]}' is no part of a ladder of recipes.")
    halving = bool(content.get("decay_off_at_half", False))
    return {f"{path.stem}_{size}": _recipe(defaults, settings, row, halving) for size, row in rows.items()}


def _recipe(defaults: list[Any], settings: dict[str, Any], row: dict[str, Any], halving: bool) -> DictConfig:
    node = OmegaConf.create({"defaults": copy.deepcopy(defaults), **copy.deepcopy(settings)})
    for column, value in row.items():
        if COLUMNS[column]:
            # YAML 1.1 reads 1e-3 without a point as text.
            OmegaConf.update(node, COLUMNS[column], float(value) if isinstance(value, str) else value)
    if "kv_heads" not in row:
        OmegaConf.update(node, "model.kv_heads", row["heads"])
    if "second_lr" in row:
        # A linear decay over the whole run is at half its peak midway, from where the second peak's decay goes on.
        second = 0.5 * float(row["second_lr"]) / float(row["first_lr"])
        stages = [
            {"share": 0.5, "lr": 1.0, "shape": "linear", "final": 0.5},
            {"share": 0.5, "lr": second, "shape": "linear", "final": 0.0, "weight_decay": 0.0 if halving else 1.0},
        ]
        OmegaConf.update(node, "schedule.stages", stages)
    return node
