"""What a forward pass keeps for its backward pass, counted by the storages behind autograd's saved tensors."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class KeptStorages:
    """The storages that tensors lie in, each once, those of ``own`` tensors (parameters, inputs) aside."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {_storage(tensor).data_ptr() for tensor in own}
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, or another could get an address again

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def add(self, tensor: Tensor) -> Tensor:
        """Count the storage of ``tensor``, which is returned as it is."""
        storage = _storage(tensor)
        if storage.data_ptr() not in self._own:
            self._storages.setdefault(storage.data_ptr(), storage)
        return tensor


@contextmanager
def counting_kept(own: Iterable[Tensor]) -> Iterator[KeptStorages]:
    """Counts what autograd saves inside the block; keep the outputs alive in it, or what they need is freed."""
    kept = KeptStorages(own)
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        yield kept


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    # torchao's linear layers save subclasses that wrap the tensor with the data.
    inner = getattr(tensor, "_data", None)
    return (inner if isinstance(inner, Tensor) else tensor).untyped_storage()
