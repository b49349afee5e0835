"""Memory of a training step by component, from the shapes alone.

An estimate for eager execution: it adds up what is alive when the backward pass begins, exactly as the
modules save it, and leaves out the temporaries of a single operation, the allocator's slack and the CUDA context.
``torch.compile`` fuses and recomputes, so it needs less. Activations are counted for the tokens of one micro-batch
(micro_batch * sequence_length). With c the bytes of the compute type (bf16-mixed 2, 32-true 4; ``auto`` is counted as
bf16-mixed) and r those of the residual type, per parameter and per token:

=====================  ===============================================================================================
component              bytes
=====================  ===============================================================================================
master weights         4 per parameter
gradients              4 per parameter
optimizer state        8 per parameter (two moments in float32); under Muon 4 per parameter of the blocks' matrices;
                       under adamw_8bit 2 and 8 per block for parameters of 4096 numbers and more
code buffers           1 per quantised parameter, 4 per quantised row
learned scales         16 each: their weight, gradient and AdamW's moments, counted with those
compute-type copies    c per parameter of float linear layers, which autocast converts (0 in 32-true)
quantised inputs       int8 codes, and 8 per token for scale and 1/rms: for q, k, v, for gate and up, for o;
                       the down projection computes its own again
norm inputs            the residual before attention and FFN (r); before a float down projection the gated state too (c)
float layers' inputs   c per input that is not quantised; behind a norm 4 more for the normed state
attention              rotated q and k, a copy of v, the output (all c), 4 per head; with norms of q and k 8 per number
                       of theirs (without autocast 4 and their whole stacked product) and 4 per head
FFN                    the stacked gate/up product (c); before a float down projection also activation and square
head and loss          final state and normed state (float32), the loss's gradients of it (c) and of the head (4)
loss chunk             the head's copy (c), and of one chunk of tokens the logits (c), float32 logits and their gradient
=====================  ===============================================================================================

A test holds the activations equal to what autograd really saves.
"""

from dataclasses import dataclass

from bitnet_train.nn.config import Activation, ActivationCheckpointing, DecoderConfig, Norms, ResidualDtype
from bitnet_train.nn.layout import block_linears, quantised_layers
from bitnet_train.planning.optimizer_state import optimizer_state
from bitnet_train.planning.parameters import ParameterCounts, count_parameters, count_scales
from bitnet_train.quant.spec import LayerQuant, QuantSpec
from bitnet_train.training.chunks import chunk_tokens
from bitnet_train.training.optimizers.config import AdamWConfig, OptimizerConfig

FLOAT32 = 4
# The linear layers of a block by the input they share.
INPUT_GROUPS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes by component; ``activations`` again by part."""

    master_weights: int
    gradients: int
    optimizer_state: int
    code_buffers: int
    compute_copies: int
    activations: dict[str, int]

    @property
    def total(self) -> int:
        """Sum of all components."""
        fixed = self.master_weights + self.gradients + self.optimizer_state + self.code_buffers + self.compute_copies
        return fixed + sum(self.activations.values())


def compute_bytes(precision: str) -> int:
    """Bytes of the compute type under ``trainer.precision``."""
    return 4 if precision == "32-true" else 2


def training_memory(
    cfg: DecoderConfig,
    spec: QuantSpec,
    micro_batch: int,
    sequence_length: int,
    precision: str,
    optimizer: OptimizerConfig | None = None,
    checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
) -> TrainingMemory:
    """Bytes that training needs (with AdamW if no ``optimizer`` is given); see the table above.

    With ``checkpointing`` (trainer.activation_checkpointing) blocks keep their inputs, and where it is selective what
    :mod:`bitnet_train.nn.recompute` says; one of them at a time keeps what it computes again.
    """
    counts = count_parameters(cfg, spec)
    compute = compute_bytes(precision)
    scales = FLOAT32 * count_scales(cfg, spec)
    return TrainingMemory(
        master_weights=FLOAT32 * counts.total + scales,
        gradients=FLOAT32 * counts.total + scales,
        optimizer_state=optimizer_state(optimizer or AdamWConfig(), cfg).bytes + 2 * scales,  # of AdamW, in Muon too
        code_buffers=_code_buffers(cfg, spec, counts),
        compute_copies=_compute_copies(cfg, counts, compute),
        activations=_activations(cfg, spec, micro_batch * sequence_length, compute, checkpointing),
    )


def _code_buffers(cfg: DecoderConfig, spec: QuantSpec, counts: ParameterCounts) -> int:
    shapes = block_linears(cfg)
    rows = sum(shapes[name.split(".", 2)[2]][0] for name in quantised_layers(cfg, spec))
    return counts.quantised + FLOAT32 * rows


def _compute_copies(cfg: DecoderConfig, counts: ParameterCounts, compute: int) -> int:
    return 0 if compute == FLOAT32 else compute * counts.linear.get("float", 0)


def _activations(
    cfg: DecoderConfig, spec: QuantSpec, tokens: int, compute: int, checkpointing: ActivationCheckpointing
) -> dict[str, int]:
    parts = {"quantised inputs": 0, "norm inputs": 0, "float layers' inputs": 0, "attention": 0, "FFN": 0}
    blocks = [_block_per_token(cfg, spec, layer, compute) for layer in range(cfg.layers)]
    if checkpointing is not ActivationCheckpointing.none:
        # The stream, and what the block before adds to it.
        inputs = cfg.layers * _residual_bytes(cfg) + (cfg.layers - 1) * compute
        largest = max(sum(block.values()) for block in blocks)
        parts = {"block inputs": tokens * cfg.hidden * inputs, "the block computed again": tokens * largest}
        blocks = []
    if checkpointing is ActivationCheckpointing.selective:
        kept = sum(_kept_per_token(cfg, spec, layer, compute) for layer in range(cfg.layers))
        parts["kept of every block"] = tokens * kept
    for block in blocks:
        for part, size in block.items():
            parts[part] += tokens * size
    # The final norm keeps its input and its normed state; the loss keeps its gradients, computed in the forward pass.
    residual = _residual_bytes(cfg)
    state = cfg.hidden * (FLOAT32 + FLOAT32 + (compute if compute != FLOAT32 or residual != FLOAT32 else FLOAT32))
    parts["head and loss"] = tokens * (state + FLOAT32) + FLOAT32 * cfg.vocab * cfg.hidden
    # Counted for a GPU, whose chunks are larger.
    chunk = min(tokens, chunk_tokens(cfg.vocab, "cuda"))
    head_copy = 0 if compute == FLOAT32 else compute * cfg.vocab * cfg.hidden
    parts["loss chunk"] = head_copy + chunk * cfg.vocab * (compute + 2 * FLOAT32)
    return parts


def _residual_bytes(cfg: DecoderConfig) -> int:
    return FLOAT32 if cfg.residual_dtype is ResidualDtype.float32 else 2


def _block_per_token(cfg: DecoderConfig, spec: QuantSpec, layer: int, compute: int) -> dict[str, int]:
    """Bytes per token that one block saves for the backward pass."""
    outs = {name: out for name, (out, _) in block_linears(cfg).items()}
    quants = {name: spec.for_layer(f"layers.{layer}.{name}") for name in outs}
    residual, sub_normed = _residual_bytes(cfg), cfg.norms is Norms.pre_sub
    (q, k, v), (o,), (gate, up), (down,) = INPUT_GROUPS
    parts = {"quantised inputs": 0, "norm inputs": 0, "float layers' inputs": 0}
    # A down projection with 8-bit inputs computes its gated input and the codes again from gate and up.
    fused_gate = quants[down].quantised and quants[down].inputs.standard
    # (layers that share the input, its width, bytes of its type, norm before it, is it kept by something else already)
    for names, width, size, normed, kept in (
        ((q, k, v), cfg.hidden, residual, True, False),
        ((o,), cfg.attention_width, compute, sub_normed, True),
        ((gate, up), cfg.hidden, residual, True, False),
        ((down,), cfg.ffn, compute, sub_normed, fused_gate),
    ):
        for part, extra in _input_per_token(
            [quants[n] for n in names], width, size, normed, kept, compute, fused_gate and names == (down,)
        ).items():
            parts[part] += extra
    parts["attention"] = compute * (outs[q] + outs[k] + outs[v] + cfg.attention_width) + FLOAT32 * cfg.heads
    if cfg.qk_norm:
        # Each norm keeps its input and the normed state in float32, and 1/rms of every head. Without a cast the input
        # is the product itself, and what is stacked in it stays.
        heads = outs[q] + outs[k]
        read = heads
        if compute == FLOAT32:
            read = _stack(quants, outs, q, (q, k, v))
            read += 0 if _same_stack(quants[q], quants[k]) else _stack(quants, outs, k, (q, k, v))
        parts["attention"] += FLOAT32 * (heads + read + cfg.heads + cfg.kv_heads)
    # up (and gate under silu) keep the whole stacked product of the layers.
    inner = _stack(quants, outs, up, (gate, up))
    if not fused_gate:
        # The activation's result, and relu's that is squared.
        inner += cfg.ffn * (2 if cfg.activation is Activation.relu2 else 1)
    if (fused_gate or cfg.activation is Activation.silu) and not _same_stack(quants[gate], quants[up]):
        inner += _stack(quants, outs, gate, (gate, up))
    parts["FFN"] = compute * inner
    return parts


def _kept_per_token(cfg: DecoderConfig, spec: QuantSpec, layer: int, compute: int) -> int:
    """Bytes per token that one block keeps under selective checkpointing, beside its inputs."""
    quants = {name: spec.for_layer(f"layers.{layer}.{name}") for name in block_linears(cfg)}
    # Attention's result.
    size = compute * cfg.attention_width + FLOAT32 * cfg.heads
    # Codes that are made with the stream, their scale and 1/rms; the stream.
    qkv, _, gate_up, _ = INPUT_GROUPS
    for group in (qkv, gate_up):
        before_ffn = group is gate_up
        first = next((quants[name] for name in group if quants[name].quantised), None)
        if (layer > 0 or before_ffn) and first is not None and first.inputs.standard:
            size += cfg.hidden + 2 * FLOAT32
            # That before the FFN is the next block's input.
            size += _residual_bytes(cfg) * cfg.hidden if not before_ffn or layer == cfg.layers - 1 else 0
    # Products narrower than their input, floats each for itself.
    shapes = block_linears(cfg)
    outs = {name: out for name, (out, _) in shapes.items()}
    for group in INPUT_GROUPS:
        products = {
            quants[name].inputs if quants[name].quantised else name: _stack(quants, outs, name, group) for name in group
        }
        size += compute * sum(width for width in products.values() if width < shapes[group[0]][1])
    # The down projection's is the next block's input, unless the scale of the weights is applied to it afterwards.
    down = quants["mlp.down_proj"]
    scaled = down.quantised and down.inputs.bits is None
    return size - (compute * cfg.hidden if layer < cfg.layers - 1 and not scaled else 0)


def _input_per_token(
    quants: list[LayerQuant], width: int, size: int, normed: bool, kept: bool, compute: int, again: bool
) -> dict[str, int]:
    """What the layers reading one input save of it, bytes per token; ``again`` if they compute its codes again."""
    # What is not quantised by the fused kernels keeps about what float inputs keep.
    bits = {8 if quant.inputs.standard else None for quant in quants if quant.quantised}
    # The float layers share one norm, the weight-only layers another.
    wide = any(not quant.quantised for quant in quants) + (None in bits)
    codes = width + FLOAT32 * (2 if normed else 1) if 8 in bits else 0
    if again and 8 in bits:
        codes = FLOAT32 if normed else 0
    # The float32 input itself: once for all that keep it; a narrower one is kept as it is by the quantiser's norm, and
    # once more as float32 by every norm outside the quantiser.
    inputs = size * width if normed and not kept and (8 in bits or size == FLOAT32) else 0
    if not normed:
        inputs_wide = 0 if kept or not wide else compute * width
    else:
        per_norm = FLOAT32 + FLOAT32 * width + compute * width + (FLOAT32 * width if size != FLOAT32 else 0)
        inputs_wide = wide * per_norm
    return {"quantised inputs": codes, "norm inputs": inputs, "float layers' inputs": inputs_wide}


def _same_stack(one: LayerQuant, other: LayerQuant) -> bool:
    return one.quantised and other.quantised and one.inputs == other.inputs


def _stack(quants: dict[str, LayerQuant], outs: dict[str, int], name: str, group: tuple[str, ...]) -> int:
    """Width of the product that the output of ``name`` is a part of."""
    if not quants[name].quantised:
        return outs[name]
    return sum(outs[other] for other in group if _same_stack(quants[name], quants[other]))
