"""Decoders whose linear layers are other libraries', written from their documentation.

- torchao quantized training: torchao.prototype.quantized_training, its README (torchao 0.18).
- torchao float8: docs.pytorch.org/ao, ``torchao.float8.convert_to_float8_training``.
- onebitllms: github.com/tiiuae/onebitllms, README, "Using quantization triton kernels".
- fla: github.com/fla-org/flash-linear-attention, fla/modules/fused_bitlinear.py.

Each takes a decoder of float layers and returns it changed. The embedding, the head and the norms stay ours; where a
library's layer norms its input itself, our norm before it is left out and its gain starts at ours.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

from bitnet_train.benchmarking.textbook import linear_names, replace_linears
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.norm import RMSNorm


def torchao_bitnet(decoder: Decoder) -> Decoder:
    """int8 forward with weights quantised in every forward, float backward."""
    from torchao.prototype.quantized_training import bitnet_training
    from torchao.quantization import quantize_

    names = linear_names(decoder)
    quantize_(decoder, bitnet_training(), filter_fn=lambda module, name: name in names)
    return decoder


def torchao_int8_mixed(decoder: Decoder) -> Decoder:
    """All three matmuls in int8, nothing ternary."""
    from torchao.prototype.quantized_training import int8_mixed_precision_training
    from torchao.quantization import quantize_

    names = linear_names(decoder)
    quantize_(decoder, int8_mixed_precision_training(), filter_fn=lambda module, name: name in names)
    return decoder


def torchao_float8(decoder: Decoder) -> Decoder:
    """All three matmuls in float8 with one scale per tensor, nothing ternary."""
    from torchao.float8 import convert_to_float8_training

    names = linear_names(decoder)
    convert_to_float8_training(decoder, module_filter_fn=lambda module, name: name in names)
    # The layers were swapped; call the new ones.
    return replace_linears(decoder, lambda name, layer, norm: layer, norm_outside=True)


def onebitllms(decoder: Decoder) -> Decoder:
    """Two fake-quantising kernels and a float matmul."""
    from onebitllms import BitNetLinear

    def replace(name: str, layer: nn.Linear, norm: RMSNorm | None) -> nn.Module:
        made: nn.Module = BitNetLinear(layer.in_features, layer.out_features)
        made.weight = layer.weight
        return made

    return replace_linears(decoder, replace, norm_outside=True)


def fla(decoder: Decoder) -> Decoder:
    """Norm and activation quantiser in one kernel, a float matmul; one norm for every layer."""
    from fla.modules.fused_bitlinear import FusedBitLinear

    def replace(name: str, layer: nn.Linear, norm: RMSNorm | None) -> nn.Module:
        made: nn.Module = FusedBitLinear(layer.in_features, layer.out_features)
        made.weight = layer.weight
        if norm is not None:
            with torch.no_grad():
                made.get_parameter("norm.weight").copy_(norm.weight)
        return made

    return replace_linears(decoder, replace, norm_outside=False)


PEERS: dict[str, Callable[[Decoder], Decoder]] = {
    "torchao": torchao_bitnet,
    "torchao_int8_mixed": torchao_int8_mixed,
    "torchao_float8": torchao_float8,
    "onebitllms": onebitllms,
    "fla": fla,
}

# Peer -> the module it is imported from.
MODULES = {
    "torchao": "torchao.prototype.quantized_training",
    "torchao_int8_mixed": "torchao.prototype.quantized_training",
    "torchao_float8": "torchao.float8",
    "onebitllms": "onebitllms",
    "fla": "fla.modules.fused_bitlinear",
}


def load_peer(name: str) -> None:
    """Import a peer's library; its complaints about kernels for other machines are not for our output."""
    for logger in ("torchao", "torch.utils._pytree"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    import_module(MODULES[name])


def peer_obstacle(name: str, device: str) -> str | None:
    """Why a peer cannot run here, or None."""
    package = MODULES[name].partition(".")[0]
    if find_spec(package) is None:
        return f"the package {package} is not installed"
    if device != "cuda" and name != "torchao":
        return "it needs a CUDA device"
    if name == "torchao_float8" and torch.cuda.get_device_capability() < (8, 9):
        return "float8 matmuls need compute capability 8.9"
    return None
