"""Checkpoints as folders of shards: what is in them, and how they are read, also by another number of processes.

    step-00000500.ckpt/
      rest.pt          what is no tensor: steps done, data consumed, the optimizer's groups and settings (torch.save)
      .metadata        torch.distributed.checkpoint's: names, shapes, and which bytes of which file are which rows
      __R_N.distcp     the rows of process R
      files-R.json     sizes and CRC-32 of the files of process R

The tensors have flat names: ``state_dict.NAME``, ``optimizer.K.NUMBER.KEY``. ``.metadata`` is a pickle, and so it is
read by an unpickler that knows the few classes of PyTorch that belong in it, and nothing else.
"""

import io
import json
import pickle
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from bitnet_train.durable import check_archive
from bitnet_train.nn.sharded_codes import shard_like

REST, METADATA = "rest.pt", ".metadata"
STATE, OPTIMIZER = "state_dict", "optimizer"
_PART = 8 << 20
# What .metadata may be made of.
_MODULES = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.storage": None,
    "torch": {"Size", "device"},
    "torch._utils": set(),
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "collections": {"OrderedDict"},
}


class _Metadata(pickle.Unpickler):
    """Makes the classes of ``_MODULES`` and the data types of torch; raises UnpicklingError for everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in _MODULES:
            names = _MODULES[module]
            found = super().find_class(module, name)
            if name in (names or ()) or (names is None and isinstance(found, type) and found.__module__ == module):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")


class ShardReader(dcp.FileSystemReader):
    """PyTorch's reader of such folders, which executes nothing that they hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_metadata(folder: Path) -> Metadata:
    """What tensors ``folder`` holds. Raises UnpicklingError or OSError when that cannot be read."""
    found = _Metadata(io.BytesIO((folder / METADATA).read_bytes())).load()
    if not isinstance(found, Metadata):
        raise pickle.UnpicklingError("it describes no tensors")
    return found


def take_apart(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Lightning's checkpoint as (what is no tensor, the tensors by flat names)."""
    rest = {key: value for key, value in checkpoint.items() if key not in (STATE, "optimizer_states")}
    tensors = {f"{STATE}.{name}": value for name, value in checkpoint[STATE].items()}
    rest["optimizer_states"] = []
    for k, saved in enumerate(checkpoint["optimizer_states"]):
        state: dict[int, dict[str, Any]] = {}
        for number, values in saved["state"].items():
            state[number] = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
            tensors |= {
                f"{OPTIMIZER}.{k}.{number}.{key}": value for key, value in values.items() if isinstance(value, Tensor)
            }
        rest["optimizer_states"].append({**saved, "state": state})
    return rest, tensors


def put_together(rest: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of :func:`take_apart`."""
    checkpoint = {**rest, STATE: {}}
    for name, tensor in tensors.items():
        kind, _, flat = name.partition(".")
        if kind == STATE:
            checkpoint[STATE][flat] = tensor
        else:
            k, number, key = flat.split(".", 2)
            checkpoint["optimizer_states"][int(k)]["state"][int(number)][key] = tensor
    return checkpoint


def read_checkpoint(path: Path, weights_only: bool = False) -> dict[str, Any]:
    """A checkpoint as one process has it: what ``torch.load`` gives for a file, the same put together from a folder.

    With ``weights_only`` the optimizer's tensors are not read. A file is mapped, not read. Nothing is executed; raises
    whatever PyTorch raises for damaged files.
    """
    if not path.is_dir():
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return found
    rest = torch.load(path / REST, map_location="cpu", weights_only=True)
    wanted = {name: entry for name, entry in _tensors(path) if not weights_only or name.startswith(f"{STATE}.")}
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in wanted.items()}
    _load(tensors, path)
    return put_together(rest, tensors)


def read_outline(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A checkpoint without its tensors, and the shapes of those of the model, by name."""
    if not path.is_dir():
        content = read_checkpoint(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in content[STATE].items()}
        return {key: value for key, value in content.items() if key != STATE}, shapes
    shapes = {
        name.removeprefix(f"{STATE}."): tuple(e.size) for name, e in _tensors(path) if name.startswith(f"{STATE}.")
    }
    return torch.load(path / REST, map_location="cpu", weights_only=True), shapes


def read_into_shards(path: Path, state: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """A checkpoint, file or folder, with the tensors sharded as ``state`` and ``parameters`` (by name) of this run are.

    Every process reads its rows alone. The optimizer's tensors follow the parameter that they belong to.
    """
    if not path.is_dir():
        content = read_checkpoint(path)
        content[STATE] = {n: shard_like(state[n], t) if n in state else t for n, t in content[STATE].items()}
        for saved in content["optimizer_states"]:
            for _, values, owner in _with_owners(saved, parameters):
                for key, value in values.items():
                    if owner is not None and isinstance(value, Tensor) and value.shape == owner.shape:
                        values[key] = shard_like(owner, value)
        return content
    rest = torch.load(path / REST, map_location="cpu", weights_only=True)
    like: dict[str, Tensor | None] = {f"{STATE}.{name}": tensor for name, tensor in state.items()}
    for k, saved in enumerate(rest["optimizer_states"]):
        like |= {f"{OPTIMIZER}.{k}.{number}": owner for number, _, owner in _with_owners(saved, parameters)}
    targets: dict[str, Tensor] = {}
    for name, entry in _tensors(path):
        model = like.get(name) if name.startswith(f"{STATE}.") else like.get(name.rpartition(".")[0])
        if isinstance(model, DTensor) and model.shape == entry.size:
            targets[name] = torch.empty_like(model, dtype=entry.properties.dtype)
        else:
            targets[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    _load(targets, path)
    return put_together(rest, targets)


def _load(tensors: dict[str, Tensor], path: Path) -> None:
    """Fill ``tensors``, each process its own part, without asking the others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
        dcp.load(tensors, storage_reader=ShardReader(path), no_dist=True)


def _with_owners(
    saved: dict[str, Any], parameters: Mapping[str, Tensor]
) -> Iterator[tuple[int, dict[str, Any], Tensor | None]]:
    """(number, values, the parameter of this run that has its name) of a saved optimizer's states."""
    names = {
        number: name
        for group in saved["param_groups"]
        for name, number in zip(group["param_names"], group["params"], strict=True)
    }
    by_suffix = {name.partition(".")[2]: parameter for name, parameter in parameters.items()} | dict(parameters)
    for number, values in saved["state"].items():
        yield number, values, by_suffix.get(names.get(number, ""))


def _tensors(folder: Path) -> Iterator[tuple[str, TensorStorageMetadata]]:
    for name, entry in read_metadata(folder).state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{name} in {folder} is no tensor")
        yield name, entry


def digest_files(folder: Path, rank: int) -> dict[str, list[int]]:
    """[size, CRC-32] of the files that process ``rank`` has written to ``folder``."""
    return {path.name: _digest(path) for path in sorted(folder.glob(f"__{rank}_*.distcp"))}


def check_folder(folder: Path, say: Callable[[str], None] | None = None) -> None:
    """Compare every file of a folder of shards with its checksum.

    Raises ValueError, with the reason in words, when one is missing or damaged, and OSError when it cannot be read.
    """
    try:
        lists = [json.loads(path.read_text()) for path in sorted(folder.glob("files-*.json"))]
        check_archive(folder / REST)
        wanted = {entry.relative_path for entry in read_metadata(folder).storage_data.values()}
    except FileNotFoundError as error:
        raise ValueError(f"{Path(str(error.filename)).name} is missing") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"its {METADATA} is damaged ({type(error).__name__})") from None
    known = {name: digest for one in lists for name, digest in one.items()}
    for name in sorted(wanted | set(known)):
        path = folder / name
        if name not in known or not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != known[name][0] or _digest(path) != known[name]:
            raise ValueError(f"the checksum of {name} does not match")


def _digest(path: Path) -> list[int]:
    crc, size = 0, 0
    with path.open("rb") as stream:
        while part := stream.read(_PART):
            crc, size = zlib.crc32(part, crc), size + len(part)
    return [size, crc]
