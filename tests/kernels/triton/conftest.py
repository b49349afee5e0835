"""Where Triton's kernels run in tests: on the GPU if there is one, otherwise in Triton's interpreter on the CPU."""

import os
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

INTERPRETED = not torch.cuda.is_available()

if INTERPRETED:
    # Triton decides when it is first imported, its own library functions included.
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set: set it first in tests/conftest.py")
    os.environ["TRITON_INTERPRET"] = "1"

    import triton.language as tl
    from triton.runtime import interpreter

    TORCH_TYPES = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
                   tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}  # fmt: skip
    UNSIGNED = {4: np.uint32, 2: np.uint16, 1: np.uint8}
    unrepaired = interpreter._convert_float

    def convert_float(data: Any, from_type: Any, to_type: Any, rounding: Any) -> Any:
        """Casts round to nearest even, as the GPU's do: the interpreter truncates to bf16 and mis-rounds to fp8."""
        if from_type not in TORCH_TYPES or to_type not in TORCH_TYPES:
            return unrepaired(data, from_type, to_type, rounding)
        source, target = TORCH_TYPES[from_type], TORCH_TYPES[to_type]
        # PyTorch reads bf16 and fp8 only as bytes.
        raw = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).copy())
        cast = raw.view(source).to(target).view(torch.uint8).numpy()
        return cast.view(UNSIGNED[target.itemsize]).reshape(data.shape)

    interpreter._convert_float = convert_float
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        """Bounds of loops are arrays of one element, which Triton 3.6 hands to ``int()`` and NumPy 2.4 refuses."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU and the interpreter."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` and ``empty_like`` give NaN or 77, so that an element that no program wrote shows."""

    def poisoned(make: Any) -> Any:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            tensor: Tensor = make(*args, **kwargs)
            if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
                tensor.view(torch.uint8).fill_(0x7F)  # NaN in both fp8 types
            elif tensor.dtype is not torch.bool:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
            return tensor

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(params=["pointers", "tma"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> str:
    """Both ways to memory; on a GPU, where TMA is a matter of its generation, "tma" means what the launcher chooses."""
    from bitnet_train.kernels.triton import tuning  # imports Triton, which must be told to interpret first

    if request.param == "pointers":
        monkeypatch.setattr(tuning, "TMA_SINCE", 10_000)
    elif device.type == "cpu":
        monkeypatch.setattr(tuning, "TMA_SINCE", 0)
    return request.param
