"""Each piece of a consumer fed our inputs: where end-to-end logits cannot tell a bug from rounding, a single piece can.

Rounding of activations to 8 bits amplifies through depth, so two right implementations differ by percents at the end;
one linear layer, one norm or one attention without its projections agrees to float32's own precision.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.export.huggingface.model_config import hf_name
from bitnet_train.kernels.gating import gated
from bitnet_train.nn.bit_linear import SharedInput
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.norm import RMSNorm
from bitnet_train.quant.activations import rms_norm


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """``|theirs - ours| / |ours|`` in the L2 norm, in float64; infinite for other shapes and for NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.double(), theirs.double()
    error = float((theirs - ours).norm() / ours.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


@dataclass
class Worst:
    """The largest error of a kind of piece, where it was, and how many pieces were compared."""

    error: float = 0.0
    name: str = ""
    count: int = 0

    def take(self, name: str, error: float) -> None:
        """Count one comparison."""
        self.count += 1
        if error > self.error or not self.name:
            self.error, self.name = error, name


@dataclass
class ProbeResult:
    """The worst relative L2 error of each kind of piece."""

    linears: Worst = field(default_factory=Worst)
    # Our linears behind our norms, as one operation against two: sums in another order may round to another code.
    fused: Worst = field(default_factory=Worst)
    norms: Worst = field(default_factory=Worst)
    # Norms whose input is so small that epsilon decides about half of the result.
    quiet_norms: Worst = field(default_factory=Worst)
    # Rotary positions, grouped heads, scaling and softmax, between our q, k, v and the input of the output projection.
    attention: Worst = field(default_factory=Worst)
    # Activation and gating, between our gate and up and the input of the down projection.
    gating: Worst = field(default_factory=Worst)


@torch.no_grad()
def probe(ours: Decoder, theirs: Any, ids: Tensor) -> ProbeResult:
    """Run ``ours`` on ids (batch, tokens) and feed every piece of ``theirs`` (a transformers model) the same inputs."""
    result = ProbeResult()
    names = {id(module): name for name, module in ours.named_modules()}
    pending: dict[str, tuple[Tensor, list[Tensor]]] = {}
    positions = torch.arange(ids.shape[1], device=ids.device)[None]

    def compare(
        module: nn.Module, _: tuple[Any, ...], options: dict[str, Any], returned: tuple[list[Tensor], Tensor]
    ) -> None:
        assert isinstance(module, SharedInput)
        outputs, x = returned
        if options:
            x = gated(options["gate"], x, options["activation"])
        name, norm = names[id(module)], module.norm_ref[0]
        block, part = name.rsplit(".", 2)[0], name.rpartition(".")[2]
        normed = x if norm is None else _compare_norm(names[id(norm)], norm, theirs, x, result)
        for layer, output in zip(module.layers, outputs, strict=True):
            layer_name = names[id(layer)]
            alone = layer(normed)
            result.linears.take(layer_name, relative_error(alone, theirs.get_submodule(hf_name(layer_name))(normed)))
            result.fused.take(layer_name, relative_error(alone, output))
        if part in ("qkv", "gate_up"):
            pending[part] = (normed, outputs)
        elif part == "out":
            hidden, qkv = pending.pop("qkv")
            piece = theirs.get_submodule(hf_name(f"{block}.self_attn"))
            rotary = theirs.model.rotary_emb(hidden, position_ids=positions)
            run = lambda: piece(hidden_states=hidden, position_embeddings=rotary, attention_mask=None)  # noqa: E731
            seen = _between(piece, ("q_proj", "k_proj", "v_proj"), qkv, ("attn_sub_norm", "o_proj"), run)
            result.attention.take(f"{block}.self_attn", relative_error(x, seen))
        elif part == "down":
            hidden, gate_up = pending.pop("gate_up")
            piece = theirs.get_submodule(hf_name(f"{block}.mlp"))
            sinks = ("ffn_sub_norm", "down_proj")
            seen = _between(piece, ("gate_proj", "up_proj"), gate_up, sinks, lambda: piece(hidden))
            result.gating.take(f"{block}.mlp", relative_error(x, seen))

    def compare_head(module: nn.Module, inputs: tuple[Any, ...], states: Any) -> None:
        assert isinstance(module, RMSNorm)
        _compare_norm("norm", module, theirs, inputs[0], result)
        logits = F.linear(states, ours.head_weight)
        result.linears.take("lm_head", relative_error(logits, theirs.lm_head(states)))

    shared = [module for module in ours.modules() if isinstance(module, SharedInput)]
    handles = [module.register_forward_hook(compare, with_kwargs=True) for module in shared]
    handles.append(ours.norm.register_forward_hook(compare_head))
    try:
        ours.hidden_states(ids)
    finally:
        for handle in handles:
            handle.remove()
    return result


def _compare_norm(name: str, norm: RMSNorm, theirs: Any, x: Tensor, result: ProbeResult) -> Tensor:
    """Compares a norm on x and on x shrunk to a mean square of epsilon; returns our normed x."""
    consumer = theirs.get_submodule(hf_name(name))
    normed = rms_norm(x, norm.weight, norm.eps)[0]
    result.norms.take(name, relative_error(normed, consumer(x)))
    quiet = x * (norm.eps / x.pow(2).mean(-1, keepdim=True).clamp(min=1e-30)).sqrt()
    result.quiet_norms.take(name, relative_error(rms_norm(quiet, norm.weight, norm.eps)[0], consumer(quiet)))
    return normed


def _between(
    piece: Any, sources: tuple[str, ...], values: list[Tensor], sinks: tuple[str, ...], run: Callable[[], Any]
) -> Tensor:
    """The input that ``run()`` gives to the first existing one of ``sinks`` when ``sources`` return ``values``."""
    sink = next(getattr(piece, name) for name in sinks if hasattr(piece, name))
    seen: list[Tensor] = []
    overridden = zip(sources, values, strict=True)
    with _hooks(
        *(getattr(piece, name).register_forward_hook(_returning(value)) for name, value in overridden),
        sink.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
    ):
        run()
    return seen[0]


def _returning(value: Tensor) -> Callable[..., Tensor]:
    return lambda *_: value


@contextmanager
def _hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
