"""The decoder-only transformer, in families that differ by two switches.

- ``norms=pre_sub, activation=relu2``: BitNet b1.58 2B4T (arXiv 2504.12285): RMSNorm before attention and FFN, again
  before o_proj and down_proj, and ``down(ffn_sub_norm(relu(gate)^2 * up))``.
- ``norms=pre_sub, activation=silu``: the ``bitnet`` architecture of llama.cpp.
- ``norms=pre, activation=silu``: the llama family, as TriLM and Falcon3-1.58 use it.
- ``norms=inside``: an RMSNorm in every projection and none before them ("Tips, Code and FAQ", microsoft/unilm).

Rotary positions, grouped-query attention, tied or untied head; biases on q, k and v (Qwen2) and norms of each head of q
and k (Qwen3) where the config asks for them. The seven projections of a block are
BitLinear or nn.Linear as the QuantSpec says; embedding, head and norms stay floats. Parameter names are those of
Hugging Face without the leading ``model.``. Norm and activation quantiser are one operation, done once for q/k/v and
once for gate/up.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.kernels.backend import Backend
from bitnet_train.kernels.op import compute_dtype
from bitnet_train.nn.attention import attention
from bitnet_train.nn.bit_linear import BitLinear, SharedInput, wide_enough
from bitnet_train.nn.collector import Collector, Projections
from bitnet_train.nn.config import ActivationCheckpointing, DecoderConfig, Norms, check_decoder
from bitnet_train.nn.kv_cache import KVCache
from bitnet_train.nn.layout import biased_linears, block_linears, check_spec
from bitnet_train.nn.norm import RMSNorm
from bitnet_train.nn.recompute import checkpointed
from bitnet_train.nn.rotary import negate_first_half, rotary_table, rotate
from bitnet_train.quant.activations import residual_sum
from bitnet_train.quant.spec import QuantSpec


class LinearFactory:
    """Makes the linear layers of one block: BitLinear or nn.Linear, as the spec says for the layer's full name."""

    def __init__(self, cfg: DecoderConfig, spec: QuantSpec, layer: int, backend: Backend | None) -> None:
        self.shapes = block_linears(cfg)
        self.biased = biased_linears(cfg)
        self.spec, self.layer, self.backend = spec, layer, backend

    def __call__(self, name: str) -> nn.Linear:
        out_features, in_features = self.shapes[name]
        quant = self.spec.for_layer(f"layers.{self.layer}.{name}")
        if not quant.quantised:
            return nn.Linear(in_features, out_features, bias=name in self.biased)
        return BitLinear(
            in_features, out_features, bias=name in self.biased, quant=quant, backend=self.backend,
            gradient=self.spec.gradient,
        )  # fmt: skip


def shared_input(owner: nn.Module, names: tuple[str, ...], norm: RMSNorm | None, cfg: DecoderConfig) -> nn.Module:
    """The projections ``names`` of a sub-layer, which read one input, behind their common norm; with ``norms=inside``
    each behind a norm of its own, which becomes the sub-layer's ``<name>_norm``."""
    layers = [getattr(owner, name) for name in names]
    if cfg.norms is not Norms.inside:
        return SharedInput(layers, norm)
    norms = [RMSNorm(layer.in_features, cfg.norm_eps) for layer in layers]
    for name, own in zip(names, norms, strict=True):
        owner.add_module(f"{name}_norm", own)
    return SeparateInputs([SharedInput((layer,), own) for layer, own in zip(layers, norms, strict=True)])


class SeparateInputs(nn.Module):
    """Projections that read one input, normed and quantised by each for itself."""

    def __init__(self, parts: list[SharedInput]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(
        self, x: Tensor, delta: Tensor | None = None, gate: Tensor | None = None, activation: str = ""
    ) -> tuple[list[Tensor], Tensor]:
        """See :meth:`SharedInput.forward`."""
        outputs: list[Tensor] = []
        for part in self.parts:
            found, x = part(x, delta) if gate is None else part(x, gate=gate, activation=activation)
            outputs, delta = outputs + found, None
        return outputs, x


class Place(NamedTuple):
    """Where the tokens are: rotary tables (tokens, head_dim) or, where sequences begin at different places,
    (batch, 1, tokens, head_dim); and a mask where plain causal attention will not do."""

    cos: Tensor
    signed_sin: Tensor
    mask: Tensor | None


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions; the norm before it is fused into its input quantiser."""

    def __init__(self, cfg: DecoderConfig, linear: LinearFactory, input_norm: RMSNorm | None) -> None:
        super().__init__()
        self.cfg = cfg
        self.q_proj = linear("self_attn.q_proj")
        self.k_proj = linear("self_attn.k_proj")
        self.v_proj = linear("self_attn.v_proj")
        self.o_proj = linear("self_attn.o_proj")
        self.q_norm, self.k_norm = (RMSNorm(cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None for _ in "qk")
        sub_norm = RMSNorm(cfg.attention_width, cfg.norm_eps) if cfg.norms is Norms.pre_sub else None
        self.attn_sub_norm = sub_norm
        self.qkv = shared_input(self, ("q_proj", "k_proj", "v_proj"), input_norm, cfg)
        self.out: nn.Module = shared_input(self, ("o_proj",), sub_norm, cfg)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        place: Place,
        cache: KVCache | None,
        layer: int,
        collector: Collector | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The attention's result for the stream ``x + delta``, and that stream."""
        batch, tokens, _ = x.shape
        parts, stream = self.qkv(x, delta)
        if collector is not None and layer in collector.projections_of:
            collector.projections[layer] = Projections(*parts)
        q, k, v = (
            part.view(batch, tokens, -1, self.cfg.head_dim).transpose(1, 2) for part in parts
        )  # each (batch, heads, tokens, head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, place.cos, place.signed_sin), rotate(k, place.cos, place.signed_sin)
        if cache is not None:
            k, v = cache.append(layer, k.to(cache.keys.dtype), v.to(cache.values.dtype))
            k, v = k.to(q.dtype), v.to(q.dtype)
        if torch.is_grad_enabled():
            # What is kept for the backward pass would otherwise be a view, and keep the whole stacked q/k/v product.
            v = v.clone(memory_format=torch.contiguous_format)
        causal = place.mask is None and (cache is None or cache.length == 0)
        y = attention(q, k, v, place.mask, causal)
        (out,), _ = self.out(y.transpose(1, 2).reshape(batch, tokens, -1))
        return out, stream


class FeedForward(nn.Module):
    """The gated FFN: ``down(norm(act(gate(x)) * up(x)))``, with the inner norm only in the pre_sub family."""

    def __init__(self, cfg: DecoderConfig, linear: LinearFactory, input_norm: RMSNorm | None) -> None:
        super().__init__()
        self.activation = cfg.activation
        self.gate_proj = linear("mlp.gate_proj")
        self.up_proj = linear("mlp.up_proj")
        self.down_proj = linear("mlp.down_proj")
        sub_norm = RMSNorm(cfg.ffn, cfg.norm_eps) if cfg.norms is Norms.pre_sub else None
        self.ffn_sub_norm = sub_norm
        self.gate_up = shared_input(self, ("gate_proj", "up_proj"), input_norm, cfg)
        self.down = shared_input(self, ("down_proj",), sub_norm, cfg)

    def forward(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The FFN's result for the stream ``x + delta``, and that stream."""
        (gate, up), stream = self.gate_up(x, delta)
        wide_enough(gate, self.activation.value)
        (out,), _ = self.down(up, gate=gate, activation=self.activation.value)
        return out, stream


class Block(nn.Module):
    """One transformer block: attention and FFN, each added to the residual stream.

    A sub-layer's result is added where the stream is read next, so that adding, norm and quantiser are one pass.
    """

    def __init__(self, cfg: DecoderConfig, linear: LinearFactory) -> None:
        super().__init__()
        before = cfg.norms is not Norms.inside
        self.input_layernorm = RMSNorm(cfg.hidden, cfg.norm_eps) if before else None
        self.self_attn = Attention(cfg, linear, self.input_layernorm)
        self.post_attention_layernorm = RMSNorm(cfg.hidden, cfg.norm_eps) if before else None
        self.mlp = FeedForward(cfg, linear, self.post_attention_layernorm)
        self.checkpointing = ActivationCheckpointing.none

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        place: Place,
        cache: KVCache | None,
        layer: int,
        collector: Collector | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The stream before this block's FFN, and the FFN's result that the next reader adds to it."""
        found: tuple[Tensor, Tensor] = checkpointed(
            self.checkpointing, self._compute, x, delta, place, cache, layer, collector
        )
        return found

    def _compute(
        self,
        x: Tensor,
        delta: Tensor | None,
        place: Place,
        cache: KVCache | None,
        layer: int,
        collector: Collector | None = None,
    ) -> tuple[Tensor, Tensor]:
        attended, x = self.self_attn(x, delta, place, cache, layer, collector)
        result, x = self.mlp(x, attended)
        return x, result


class Decoder(nn.Module):
    """Token ids to logits.

    Args:
        cfg: the shape; checked.
        spec: which linear layers are quantised how; checked against the layers.
        backend: kernel backend; chosen by device when None.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: DecoderConfig, spec: QuantSpec, backend: Backend | None = None) -> None:
        check_decoder(cfg)
        check_spec(cfg, spec)
        super().__init__()
        self.cfg, self.spec = cfg, spec
        self.residual_dtype: torch.dtype = getattr(torch, cfg.residual_dtype.value)
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.hidden)
        self.layers = nn.ModuleList(Block(cfg, LinearFactory(cfg, spec, i, backend)) for i in range(cfg.layers))
        self.norm = RMSNorm(cfg.hidden, cfg.norm_eps)
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(cfg.hidden, cfg.vocab, bias=False)
        cos, sin = rotary_table(cfg.head_dim, cfg.context, cfg.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def checkpoint_activations(self, what: ActivationCheckpointing) -> None:
        """Choose what of every block the backward pass computes again; see :mod:`bitnet_train.nn.recompute`."""
        for block in self.layers:
            assert isinstance(block, Block)
            block.checkpointing = what

    @property
    def head_weight(self) -> Tensor:
        """The output head's weight (vocab, hidden): the embedding's when tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden_states(
        self,
        ids: Tensor,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
        collector: Collector | None = None,
    ) -> Tensor:
        """ids (batch, tokens) -> final normed states (batch, tokens, hidden).

        ``documents`` (batch, tokens) numbers the document of each token and keeps attention inside documents.
        ``cache`` supplies past tokens and receives the new ones; not together with ``documents``. ``collector``
        receives what it asks for of the blocks' insides.
        """
        tokens = ids.shape[1]
        start = cache.length if cache is not None else 0
        if start + tokens > self.cfg.context:
            raise ValueError(f"{start + tokens} tokens exceed model.context={self.cfg.context}")
        place = self._place(tokens, start, documents, cache, ids.device)
        x: Tensor = self.embed_tokens(ids).to(self.residual_dtype)
        delta: Tensor | None = None
        for i, block in enumerate(self.layers):
            x, delta = block(x, delta, place, cache, i, collector)
            if collector is not None and i in collector.streams_of:
                collector.streams[i] = residual_sum(x, delta)
        if cache is not None:
            cache.length += tokens
        return self.norm(residual_sum(x, delta))

    def _place(
        self, tokens: int, start: int, documents: Tensor | None, cache: KVCache | None, device: torch.device
    ) -> Place:
        if cache is not None and cache.padding is not None:
            steps = torch.arange(start, start + tokens, device=device)
            # (batch, 1, tokens), for all heads. What is padding has no position; it gets the first.
            positions = (steps - cache.padding[:, None]).clamp(min=0)[:, None]
            mask = _padding_mask(steps, cache.padding)
            return Place(self.cos[positions], negate_first_half(self.sin[positions]), mask)
        causal = _attention_mask(tokens, start, documents, device, cache is not None)
        cos, sin = self.cos[start : start + tokens], self.sin[start : start + tokens]
        return Place(cos, negate_first_half(sin), causal)

    def forward(self, ids: Tensor, documents: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """ids (batch, tokens) -> logits (batch, tokens, vocab) in the autocast type or the parameters' type."""
        states = self.hidden_states(ids, documents, cache)
        weight = self.head_weight
        return F.linear(states.to(compute_dtype(weight)), weight)

    def new_cache(self, batch: int, capacity: int, padding: Tensor | None = None) -> KVCache:
        """An empty KV cache on the model's device, in the parameters' type; see :class:`KVCache` for the arguments."""
        weight = self.embed_tokens.weight
        return KVCache(self.cfg, batch, capacity, weight.device, weight.dtype, padding)


def _padding_mask(steps: Tensor, padding: Tensor) -> Tensor:
    """True (batch, 1, queries, keys) where the query at one of ``steps`` may look, keys starting with the padding."""
    keys = torch.arange(int(steps[-1]) + 1, device=steps.device)
    seen = (keys <= steps[:, None]) & (keys >= padding[:, None, None])
    # Padding looks at itself, for a softmax over nothing is NaN.
    return (seen | (keys == steps[:, None]))[:, None]


def _attention_mask(
    tokens: int, start: int, documents: Tensor | None, device: torch.device, cached: bool
) -> Tensor | None:
    """None where plain causal attention (or a single new token) will do, otherwise True where a query may look."""
    if documents is not None:
        if cached:
            raise ValueError("document boundaries and a KV cache cannot be combined")
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        return (causal & (documents[:, :, None] == documents[:, None, :]))[:, None]
    if start == 0 or tokens == 1:
        return None
    return torch.ones(tokens, start + tokens, dtype=torch.bool, device=device).tril(diagonal=start)
