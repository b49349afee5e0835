"""The roofline's arithmetic against numbers worked out by hand."""

from dataclasses import replace

import pytest

from bitnet_train.nn.config import ActivationCheckpointing, DecoderConfig
from bitnet_train.planning.roofline import (
    STYLES,
    DeviceRates,
    LinearWork,
    StepWork,
    ceiling,
    layer_prediction,
    matmul_seconds,
    step_prediction,
)

# One operation or byte per second of fp32, so that seconds are counts; the others are multiples.
RATES = DeviceRates(fp32=1.0, bf16=2.0, int8=4.0, fp8=8.0, bandwidth=1.0)
MODEL = DecoderConfig(hidden=4, layers=1, heads=2, kv_heads=1, ffn=6, context=8, vocab=10)


def work(style: str, compute: str, micro_batches: int = 1, kinds: tuple[str, str, str] | None = None) -> StepWork:
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    linear = LinearWork(style, *(kinds or (compute, compute, compute)))
    return StepWork(8, micro_batches, 8, compute, {f"layers.0.{name}": linear for name in names})


def test_operations_of_a_dense_step() -> None:
    parts = step_prediction(MODEL, work("compiled dense", "fp32"), RATES)
    # q 4x4, k and v 2x4, o 4x4, gate, up and down 6x4 each: 120 weights, 3 matmuls, 2 operations, 8 tokens.
    assert parts["block matmuls"] == 120 * 3 * 2 * 8
    # 3 * 4 * tokens * blocks * hidden * sequence / 2
    assert parts["attention"] == 3 * 4 * 8 * 1 * 4 * 4
    # 3 matmuls of 8 x 4 x 10, and 6 passes over 8 x 10 float32 logits
    assert parts["head and loss"] == 3 * 2 * 8 * 4 * 10 + 6 * 4 * 80


def test_bytes_of_a_dense_step() -> None:
    parts = step_prediction(MODEL, work("compiled dense", "fp32"), RATES)
    # Shared inputs: qkv 4, o 4, gate/up 4, down 6 wide; 5r + 6c = 44 bytes. Outputs: 4+2+2+4+6+6+4 = 28; 5c = 20.
    assert parts["activations"] == 8 * (18 * 44 + 28 * 20)
    # Per weight (4 + 2c) + (2c + 4) = 24.
    assert parts["weights"] == 120 * 24
    # Embedding 40, weights 120, norms 4 + 4 + 4 + 6 and the final 4.
    assert parts["optimizer"] == 40 * (40 + 120 + 22)


def test_muon_orthogonalises_the_matrices_of_the_blocks() -> None:
    five = replace(work("compiled dense", "fp32"), newton_schulz=5)
    # Of (n, k): X X^T and B X take 2 s*s*l operations each, A A 2 s^3. q and o 4x4, k and v 2x4, three of 6x4.
    operations = 2 * (4 * 4 * 4 * 4 + 2 * 4**3) + 2 * (4 * 2 * 2 * 4 + 2 * 2**3) + 3 * (4 * 4 * 4 * 6 + 2 * 4**3)
    assert step_prediction(MODEL, five, RATES)["orthogonalisation"] == pytest.approx(5 * operations / 2)
    assert "orthogonalisation" not in step_prediction(MODEL, work("compiled dense", "fp32"), RATES)


def test_what_is_computed_again_costs_a_forward_or_part_of_it() -> None:
    plain = work("compiled dense", "fp32")
    full = step_prediction(MODEL, replace(plain, checkpointing=ActivationCheckpointing.full), RATES)
    # 120 weights and attention once; (2r + 3c) = 20 bytes per shared input, 2c = 8 per output, 4 + 2c = 12 per weight.
    passes = 8 * (18 * 20 + 28 * 8)
    assert full["computed again"] == 120 * 2 * 8 + 4 * 8 * 4 * 4 + passes + 120 * 12
    selective = step_prediction(MODEL, replace(plain, checkpointing=ActivationCheckpointing.selective), RATES)
    # Not k, v (2x4) and down (4x6), which are narrow, and not attention.
    assert selective["computed again"] == 80 * 2 * 8 + passes + 80 * 12
    assert "computed again" not in step_prediction(MODEL, plain, RATES)


def test_a_ternary_step_runs_each_matmul_at_its_rate() -> None:
    parts = step_prediction(MODEL, work("fused ternary", "bf16", kinds=("int8", "fp8", "bf16")), RATES)
    assert parts["block matmuls"] == pytest.approx(120 * 2 * 8 * (1 / 4 + 1 / 8 + 1 / 2))
    # r = 4, c = 2: 5r + 3c + 3 = 29 per shared input, 5c + 2 = 12 per output.
    assert parts["activations"] == 8 * (18 * 29 + 28 * 12)
    # 1 + 5 in the micro-batch, 9 for the refresh.
    assert parts["weights"] == 120 * 15


def test_the_weights_are_ternarised_once_however_many_micro_batches() -> None:
    ours = step_prediction(MODEL, work("fused ternary", "bf16", 3), RATES)["weights"]
    textbook = step_prediction(MODEL, work("eager textbook", "fp32", 3), RATES)["weights"]
    assert ours == 120 * (3 * 6 + 9 + 2 * 8)
    assert textbook == 120 * (3 * (72 + 16) + 2 * 8)


def test_a_layer_forward_and_backward() -> None:
    linear = LinearWork("fused ternary", "int8", "int8", "bf16")
    forward = layer_prediction(3, 5, 7, linear, "bf16", RATES, backward=False)
    # 2 * 105 / 4; K: c + 2 = 4, N: c = 2, weights 1
    assert forward == pytest.approx(2 * 105 / 4 + 3 * 5 * 4 + 3 * 7 * 2 + 35)
    both = layer_prediction(3, 5, 7, linear, "bf16", RATES, backward=True)
    assert both == pytest.approx(forward + 2 * 105 * (1 / 4 + 1 / 2) + 15 * 3 + 21 * 6 + 35 * 5)


def test_the_ceiling_is_that_of_the_facts() -> None:
    assert [round(ceiling(r), 2) for r in (1.41, 1.75, 2.0)] == [1.24, 1.4, 1.5]
    assert matmul_seconds(2, 3, 4, ("fp32", "bf16"), RATES) == 48 + 24


def test_every_style_of_the_table_has_both_directions() -> None:
    for style in STYLES.values():
        for passes in (style.forward, style.backward):
            assert passes.output.of(4, 2) > 0
            assert passes.weight.of(4, 2) > 0
