"""Faults to plant in a folder for ``transformers``: each a function that damages the folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.export.conftest import edit_json, edit_tensors

Plant = Callable[[Path], None]


def config_fault(*path: str, value: Any, file: str = "config.json") -> Plant:
    """Another value in a JSON file, at the end of a path of keys."""

    def edit(config: dict[str, Any]) -> None:
        for key in path[:-1]:
            config = config[key]
        assert config[path[-1]] != value
        config[path[-1]] = value

    return lambda folder: edit_json(folder / file, edit)


def tensor_fault(change: Callable[[dict[str, Tensor]], None]) -> Plant:
    """Changed tensors."""
    return lambda folder: edit_tensors(folder, change)


def swap(first: str, second: str) -> Plant:
    """All tensors of two modules in each other's place."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if f".{first}." in name]:
            other = name.replace(first, second)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return tensor_fault(change)


def invert_scales(where: str) -> Plant:
    """The inverse of the scales of every layer whose name contains ``where``."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("weight_scale") and where in name:
                tensor.reciprocal_()

    return tensor_fault(change)


def flip_one_code(tensors: dict[str, Tensor]) -> None:
    """Another code in one place."""
    packed = tensors["model.layers.1.mlp.down_proj.weight"]
    code = int(packed[2, 3]) & 3
    packed[2, 3] += 1 if code < 2 else -1


def nudge(name: str) -> Plant:
    """Four numbers of a tensor off by a thousandth."""
    return tensor_fault(lambda tensors: tensors[name].view(-1)[:4].mul_(1.001))


def swap_merges(folder: Path) -> None:
    """The last two merges in each other's place."""

    def edit(content: dict[str, Any]) -> None:
        merges = content["model"]["merges"]
        merges[-1], merges[-2] = merges[-2], merges[-1]

    edit_json(folder / "tokenizer.json", edit)


def drop_merges(folder: Path) -> None:
    """A tokenizer of single bytes."""
    edit_json(folder / "tokenizer.json", lambda content: content["model"]["merges"].clear())


def no_bos(folder: Path) -> None:
    """A tokenizer that starts no document."""
    edit_json(folder / "tokenizer.json", lambda content: content.update(post_processor=None))


def truncate(folder: Path) -> None:
    """Weights that end early."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
