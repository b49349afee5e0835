"""The estimate against real modules: parameters, what autograd saves, the optimizer's state and a real checkpoint."""

import gc
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitnet_train.commands.estimate import COUNT_UNITS, human
from bitnet_train.export.config import ExportDtype
from bitnet_train.nn.audit import audit
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.config import Activation, ActivationCheckpointing, DecoderConfig, Norms, ResidualDtype
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.kept import counting_kept
from bitnet_train.nn.layout import Role, parameter_table
from bitnet_train.planning.curve import characteristic_points, draw
from bitnet_train.planning.flops import forward_flops, forward_flops_per_token, training_flops_per_token
from bitnet_train.planning.memory import FLOAT32, training_memory
from bitnet_train.planning.parameters import count_parameters
from bitnet_train.planning.sizes import ENTRY_BYTES, checkpoint_bytes, export_sizes
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from bitnet_train.training.losses.cross_entropy import linear_cross_entropy
from bitnet_train.training.optimizers.build import build_optimizer
from bitnet_train.training.optimizers.config import AdamWConfig, MuonConfig, OptimizerConfig
from tests.composing import compose_config

SMALL = DecoderConfig(hidden=64, layers=2, heads=4, kv_heads=2, ffn=160, context=64, vocab=300)
FAMILIES = {
    "2b4t": (Norms.pre_sub, Activation.relu2),
    "llama.cpp": (Norms.pre_sub, Activation.silu),
    "llama": (Norms.pre, Activation.silu),
}
SPECS = {
    "ternary": QuantSpec(),
    "binary by row": QuantSpec(LayerQuant(scheme="binary", groups="row")),
    "float": QuantSpec(FLOAT),
    "weights only": QuantSpec(LayerQuant(activation_bits=None)),
    "mixed": QuantSpec(
        LayerQuant(),
        (("*v_proj", FLOAT), ("*gate_proj", FLOAT), ("layers.1.*o_proj", LayerQuant(activation_bits=None))),
    ),
}
BATCH, LENGTH = 2, 32


def family(name: str, **changes: object) -> DecoderConfig:
    norms, activation = FAMILIES[name]
    return replace(SMALL, norms=norms, activation=activation, **changes)  # type: ignore[arg-type]


def live_tensors() -> list[torch.Tensor]:
    """Every tensor that Python holds. (By type: isinstance asks lazy modules of transformers to load.)"""
    return [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]


def saved_bytes(
    cfg: DecoderConfig, spec: QuantSpec, bf16: bool, what: ActivationCheckpointing = ActivationCheckpointing.none
) -> int:
    """Bytes of all storages that autograd keeps for the backward pass, parameters and buffers aside."""
    model = Decoder(cfg, spec)
    model.checkpoint_activations(what)
    CodeCache(model)
    ids = torch.randint(0, cfg.vocab, (BATCH, LENGTH + 1))
    selective = what is ActivationCheckpointing.selective
    before = live_tensors() if selective else []
    own = (*model.parameters(), *model.buffers())
    with counting_kept(own) as kept, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = linear_cross_entropy(model.hidden_states(ids[:, :-1]), model.head_weight, ids[:, 1:])
    assert loss.requires_grad
    if selective:
        # What it keeps is no saved tensor of autograd's.
        known = {id(tensor) for tensor in [loss, ids, *before]}
        for tensor in live_tensors():
            if id(tensor) not in known:
                kept.add(tensor)
    return kept.nbytes


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16-mixed", "32-true"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", FAMILIES)
def test_activation_memory_is_what_autograd_saves(name: str, spec: str, bf16: bool) -> None:
    for residual in (ResidualDtype.float32, *([ResidualDtype.bfloat16] if bf16 else [])):
        cfg = family(name, residual_dtype=residual)
        memory = training_memory(cfg, SPECS[spec], BATCH, LENGTH, "bf16-mixed" if bf16 else "32-true")
        # A chunk's logits live while the loss is computed.
        expected = sum(memory.activations.values()) + memory.compute_copies - memory.activations["loss chunk"]
        assert saved_bytes(cfg, SPECS[spec], bf16) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16-mixed", "32-true"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("what", [ActivationCheckpointing.full, ActivationCheckpointing.selective])
def test_blocks_that_are_computed_again_keep_their_inputs(
    name: str, spec: str, bf16: bool, what: ActivationCheckpointing
) -> None:
    precision = "bf16-mixed" if bf16 else "32-true"
    for residual in (ResidualDtype.float32, *([ResidualDtype.bfloat16] if bf16 else [])):
        cfg = family(name, residual_dtype=residual)
        again = training_memory(cfg, SPECS[spec], BATCH, LENGTH, precision, checkpointing=what).activations
        expected = again["block inputs"] + again.get("kept of every block", 0) + again["head and loss"]
        found = saved_bytes(cfg, SPECS[spec], bf16, what)
        # Rotary tables are counted with what selective checkpointing keeps.
        found -= FLOAT32 * LENGTH * cfg.head_dim * (what is ActivationCheckpointing.selective)
        assert found == pytest.approx(expected, rel=0.01)
        whole = training_memory(cfg, SPECS[spec], BATCH, LENGTH, precision).activations
        blocks = sum(size for part, size in whole.items() if part not in ("head and loss", "loss chunk"))
        if spec != "mixed":  # whose blocks differ: the largest counts
            assert again["the block computed again"] == blocks // cfg.layers
        assert blocks / cfg.layers <= again["the block computed again"] < blocks


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16-mixed", "32-true"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("parts", [{"attention_bias": True}, {"qk_norm": True}, {"qk_norm": True, "head_width": 32}])
def test_qwens_parts_are_in_the_activation_memory(parts: dict[str, object], spec: str, bf16: bool) -> None:
    cfg = family("llama", **parts)
    memory = training_memory(cfg, SPECS[spec], BATCH, LENGTH, "bf16-mixed" if bf16 else "32-true")
    expected = sum(memory.activations.values()) + memory.compute_copies - memory.activations["loss chunk"]
    assert saved_bytes(cfg, SPECS[spec], bf16) == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("rule", [AdamWConfig(), MuonConfig()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("spec", SPECS)
def test_weights_and_states(spec: str, rule: OptimizerConfig) -> None:
    model = Decoder(SMALL, SPECS[spec])
    optimizer = build_optimizer(rule, model)
    CodeCache(model, optimizer)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    memory = training_memory(SMALL, SPECS[spec], BATCH, LENGTH, "32-true", rule)
    total = sum(p.numel() for p in model.parameters())
    assert memory.master_weights == memory.gradients == 4 * total
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert memory.optimizer_state == sum(t.nbytes for t in states)
    named = {name: buffer for name, buffer in model.named_buffers() if name.endswith(("codes", "row_scale"))}
    buffers = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in named.values()}
    assert memory.code_buffers == sum(buffers.values())
    linear = sum(p.size for p in parameter_table(SMALL) if p.role is Role.linear)
    per_parameter = 16 * total - (4 * linear if isinstance(rule, MuonConfig) else 0)
    assert memory.total == per_parameter + memory.code_buffers + sum(memory.activations.values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_counts_are_the_audits(spec: str, tied: bool) -> None:
    cfg = replace(SMALL, tie_embeddings=tied)
    counts, report = count_parameters(cfg, SPECS[spec]), audit(Decoder(cfg, SPECS[spec]))
    assert counts.total == report.total_parameters
    assert counts.linear == report.parameters
    assert counts.quantised_share == report.quantised_share
    assert (counts.head == 0) is tied


@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(LayerQuant(groups="row", trainable_scale=True))])
@pytest.mark.parametrize("rule", [AdamWConfig(), MuonConfig()], ids=lambda rule: rule.name)
def test_checkpoint_size(rule: OptimizerConfig, spec: QuantSpec) -> None:
    # A real last.ckpt of the tiny recipe, weights and AdamW's state.
    assert checkpoint_bytes(compose_config("+recipe=tiny").model, QuantSpec()) == pytest.approx(53_612_751, rel=1e-3)
    model = Decoder(SMALL, spec)
    optimizer = build_optimizer(rule, model)
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    stream = io.BytesIO()
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, stream)
    entries = 4 * len(list(model.parameters()))
    assert abs(len(stream.getvalue()) - checkpoint_bytes(SMALL, spec, rule)) < ENTRY_BYTES * entries


def test_export_sizes_count_codes_and_scales() -> None:
    sizes = {size.packing: size for size in export_sizes(SMALL, QuantSpec(), ExportDtype.bfloat16)}
    linear = [p.size for p in parameter_table(SMALL) if p.role is Role.linear]
    norms = sum(p.size for p in parameter_table(SMALL) if p.role is Role.norm)
    scales = 4 * len(linear)
    assert sizes["2 bits per code"].without_embeddings == sum(linear) // 4 + 2 * norms + scales
    assert sizes["five codes a byte"].without_embeddings == sum(-(-n // 5) for n in linear) + 2 * norms + scales
    assert sizes["all bfloat16"].total == 2 * sum(p.size for p in parameter_table(SMALL))
    for size in sizes.values():
        assert size.total - size.without_embeddings == 2 * SMALL.vocab * SMALL.hidden
    by_row = export_sizes(SMALL, QuantSpec(LayerQuant(groups="row")), ExportDtype.bfloat16)[0]
    rows = sum(p.shape[0] for p in parameter_table(SMALL) if p.role is Role.linear)
    assert by_row.total - sizes["2 bits per code"].total == 4 * rows - scales


def test_operations_by_hand() -> None:
    parts = forward_flops(SMALL, LENGTH)
    block = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 160 * 64
    assert parts == {"linear layers": 2 * 2 * block, "attention": 4 * 2 * 64 * LENGTH / 2, "head": 2 * 300 * 64}
    assert training_flops_per_token(SMALL, LENGTH) == 3 * forward_flops_per_token(SMALL, LENGTH)


def test_the_curve_shows_both_sides_of_a_border() -> None:
    points = {p.what: p for p in characteristic_points(compose_config("+recipe=2b4t"))}
    assert points["end of warm-up"].lr == pytest.approx(1.2e-3)
    assert points["end of stage 1"].lr == pytest.approx(6e-4)
    assert points["stage 2 begins"].lr == pytest.approx(2.4e-4)
    assert points["stage 2 begins"].step == points["end of stage 1"].step + 1
    assert points["stage 2 begins"].weight_decay == points["last step"].lr == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_curve_of_very_short_runs(steps: int, tmp_path: Path) -> None:
    cfg = compose_config("+recipe=tiny", f"trainer.max_steps={steps}", "schedule.warmup=0")
    points = characteristic_points(cfg)
    assert [p.step for p in points] == sorted({p.step for p in points})
    assert points[-1].step == steps - 1
    draw(cfg, "short", tmp_path / "a" / "curve.png")
    assert (tmp_path / "a" / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "1.00 kB"), (64, "64 B"), (521_898_624, "0.52 GB"), (28_957_000_000, "29.0 GB"),
     (1.2e11, "120 GB"), (53_612_751, "53.6 MB")],
)  # fmt: skip
def test_sizes_in_words(value: float, text: str) -> None:
    assert human(value) == text


def test_counts_in_words() -> None:
    assert human(16.4e9, COUNT_UNITS) == "16.4 G"
    assert human(524_288, COUNT_UNITS) == "0.52 M"
    assert human(12, COUNT_UNITS) == "12"
