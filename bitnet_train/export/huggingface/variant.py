"""The three things that a ``transformers`` folder can hold: packed codes, master weights, or plain dense weights."""

from dataclasses import dataclass
from enum import Enum

import torch

from bitnet_train.export.config import ExportConfig, ExportDtype, LinearClass
from bitnet_train.nn.config import DecoderConfig, Norms


class Storage(Enum):
    """What stands for the weights of a quantised layer; the value is the format's name."""

    packed = "hf-packed"
    master = "hf-master"
    dense = "hf-dense"


@dataclass(frozen=True)
class Variant:
    """A kind of ``transformers`` folder: what stands for a quantised weight, read by which class, in which type."""

    storage: Storage
    dtype: ExportDtype = ExportDtype.float32
    # "autobitlinear" or "bitlinear"; None for dense weights.
    linear_class: str | None = "autobitlinear"

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as PyTorch knows it."""
        return getattr(torch, self.dtype.value)

    @property
    def inverse_scales(self) -> bool:
        """Whether ``weight_scale`` holds 1 / scale (transformers' BitLinear divides by it)."""
        return self.linear_class == "bitlinear"


def choose_variant(storage: Storage, model: DecoderConfig, cfg: ExportConfig) -> Variant:
    """The variant that ``cfg`` asks for."""
    if storage is not Storage.packed:
        # Only AutoBitLinear quantises master weights in the forward pass.
        return Variant(storage, cfg.dtype, "autobitlinear" if storage is Storage.master else None)
    linear_class = cfg.linear_class
    if linear_class is LinearClass.auto:
        linear_class = LinearClass.bitlinear if model.norms is Norms.pre else LinearClass.autobitlinear
    return Variant(storage, cfg.dtype, linear_class.value)
