"""Penalties on the weights: closed forms, gradients against autograd, strength over the run, and a real run."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet_train.errors import ConfigError
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from bitnet_train.quant.weights import Codes, masters_from_codes, quantise_weight
from bitnet_train.training.regularisers.config import (
    CodeDistance,
    CodesRegulariser,
    CodeTarget,
    EntropyRegulariser,
    NoRegulariser,
    RegulariserConfig,
    check_regulariser,
    strength_at,
)
from bitnet_train.training.regularisers.penalties import build_regulariser, code_penalty, entropy_penalty, fixed_point
from tests.training.conftest import InProcess, Workspace

CFG = DecoderConfig(hidden=32, layers=2, heads=2, kv_heads=1, ffn=64, context=64, vocab=97)


def weight_and_codes(groups: int = 1, scheme: str = "ternary") -> tuple[Tensor, Codes]:
    weight = torch.randn(8, 24)
    return weight, quantise_weight(weight, LayerQuant(scheme, groups=groups))


@pytest.mark.parametrize("distance", CodeDistance)
def test_the_distance_from_codes_by_hand(distance: CodeDistance) -> None:
    # u = w / 2 is 0.25, 1.5, -1; off by 0.25, 0.5, 0.
    weight = torch.tensor([[0.5, 3.0, -2.0]])
    codes = Codes(torch.tensor([[0, 1, -1]], dtype=torch.int8), torch.tensor([2.0]))
    value, grad = code_penalty(weight, codes, distance, CodeTarget.scale, LayerQuant())
    if distance is CodeDistance.squared:
        assert float(value) == pytest.approx((0.0625 + 0.25) / 3)
        assert grad.tolist()[0] == pytest.approx([2 * 0.25 / 2 / 3, 2 * 0.5 / 2 / 3, 0.0])
    else:
        assert float(value) == pytest.approx(0.25)
        assert grad.tolist()[0] == pytest.approx([1 / 6, 1 / 6, 0.0])
    # Two codes of three are nonzero, so their fixed point is at 1.5 scales.
    value, _ = code_penalty(weight, codes, distance, CodeTarget.fixed_point, LayerQuant())
    assert float(value) == pytest.approx((0.0625 + 0 + 0.25) / 3 if distance is CodeDistance.squared else 0.25)


@pytest.mark.parametrize("distance", CodeDistance)
@pytest.mark.parametrize("target", CodeTarget)
@pytest.mark.parametrize("scheme", ["ternary", "binary"])
def test_the_gradient_of_the_distance_is_autograds(distance: CodeDistance, target: CodeTarget, scheme: str) -> None:
    weight, codes = weight_and_codes(groups=4, scheme=scheme)
    leaf = weight.clone().requires_grad_()
    places = codes.dequantise()
    if target is CodeTarget.fixed_point:
        places = masters_from_codes(codes, LayerQuant(scheme, groups=4))
    off = (leaf - places) / codes.row_scale()[:, None]
    wanted = off.square().mean() if distance is CodeDistance.squared else off.abs().mean()
    value, grad = code_penalty(weight, codes, distance, target, LayerQuant(scheme, groups=4))
    torch.testing.assert_close(value, wanted.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, leaf)[0])


def test_only_the_fixed_point_is_one() -> None:
    scales = {}
    for target in CodeTarget:
        weight, layer = torch.randn(32, 64), LayerQuant()
        before = quantise_weight(weight, layer)
        for _ in range(300):
            codes = quantise_weight(weight, layer)
            pull = code_penalty(weight, codes, CodeDistance.squared, target, layer)[1]
            weight = weight - 0.05 * weight.numel() * codes.scale**2 * pull
        after = quantise_weight(weight, layer)
        scales[target] = float(after.scale / before.scale)
        if target is CodeTarget.fixed_point:
            assert torch.equal(after.codes, before.codes)
            assert float(code_penalty(weight, after, CodeDistance.squared, target, layer)[0]) < 1e-6
    assert scales[CodeTarget.fixed_point] == pytest.approx(1, abs=0.1)
    assert scales[CodeTarget.scale] < 0.1


@pytest.mark.parametrize(
    "layer",
    [
        LayerQuant("binary", groups=4),
        LayerQuant(threshold=0.7, groups="row"),
        LayerQuant(statistic="absmedian"),
        LayerQuant("symmetric", bits=2),
        LayerQuant("symmetric", bits=2, statistic="absmean"),
        LayerQuant("symmetric", bits=4, groups=4),
        LayerQuant("symmetric", bits=4, statistic="absmean"),
        LayerQuant("symmetric", bits=8),
    ],
    ids=str,
)
def test_the_fixed_point_gives_codes_and_scale_back(layer: LayerQuant) -> None:
    codes = quantise_weight(torch.randn(64, 96), layer)
    places = fixed_point(codes, layer) * codes.scale[:, None]
    weight = (codes.codes.float().reshape(len(codes.scale), -1) * places).reshape(codes.codes.shape)
    again = quantise_weight(weight, layer)
    torch.testing.assert_close(again.scale, codes.scale, rtol=1e-6, atol=0)
    assert torch.equal(again.codes, codes.codes)
    value, grad = code_penalty(weight, again, CodeDistance.squared, CodeTarget.fixed_point, layer)
    assert float(value) < 1e-10
    assert float(grad.abs().max()) < 1e-6


def test_a_learned_scale_is_where_its_weights_are_pulled() -> None:
    layer = LayerQuant(groups="row", trainable_scale=True)
    codes = quantise_weight(torch.randn(8, 24), LayerQuant(groups="row"))
    value, _ = code_penalty(codes.dequantise(), codes, CodeDistance.squared, CodeTarget.fixed_point, layer)
    assert float(value) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("regulariser", ["codes", "entropy regulariser.floor=1.585"])
def test_stages_of_more_bits_are_left_alone(workspace: Workspace, regulariser: str) -> None:
    settings = ("quant/progressive=bits", "quant.progressive.stages=[{bits: 8, until: 2}]", "trainer.max_steps=4",
                *f"regulariser={regulariser}".split(), "regulariser.start=0", "regulariser.ramp=0")  # fmt: skip
    code, output = InProcess(workspace.folder).run(*settings, "run_name=staged")
    assert code == 0, output
    found = [row["loss/regulariser"] for row in workspace.rows("staged")]
    assert found[:2] == ["", ""]
    assert all(float(value) > 0 for value in found[2:4])


def soft_entropy(weight: Tensor, row_scale: Tensor, threshold: float, temperature: float) -> Tensor:
    u = weight / row_scale[:, None]
    q = torch.stack([k * u - abs(k) * threshold for k in (-1, 0, 1)], -1).div(temperature).softmax(-1)
    p = q.flatten(0, 1).mean(0)
    return -(p * p.log2()).sum()


@pytest.mark.parametrize(("threshold", "temperature"), [(0.5, 0.1), (0.7, 0.5), (0.5, 2.0)])
def test_the_gradient_of_the_entropy_is_autograds(threshold: float, temperature: float) -> None:
    weight, codes = weight_and_codes(groups=2)
    row_scale = codes.row_scale()
    leaf = weight.clone().requires_grad_()
    entropy = soft_entropy(leaf, row_scale, threshold, temperature)
    value, grad = entropy_penalty(weight, row_scale, threshold, math.log2(3), temperature)
    torch.testing.assert_close(value, (math.log2(3) - entropy).detach(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(grad, torch.autograd.grad(-entropy, leaf)[0], atol=1e-7, rtol=1e-4)


def test_above_the_floor_nothing_is_penalised() -> None:
    weight, codes = weight_and_codes()
    value, grad = entropy_penalty(weight, codes.row_scale(), 0.5, 0.5, 0.1)
    assert float(value) == 0
    assert not grad.any()


def test_at_a_low_temperature_it_is_the_entropy_of_the_codes() -> None:
    weight, codes = weight_and_codes()
    shares = torch.bincount((codes.codes + 1).flatten().long(), minlength=3) / weight.numel()
    value, _ = entropy_penalty(weight, codes.row_scale(), 0.5, math.log2(3), 1e-4)
    assert math.log2(3) - float(value) == pytest.approx(float(-(shares * shares.log2()).sum()), abs=1e-4)
    # Equal shares of the three codes have the largest entropy, one code alone none.
    thirds = torch.tensor([[-1.0, 0.0, 1.0]])
    assert float(entropy_penalty(thirds, torch.ones(1), 0.5, math.log2(3), 1e-3)[0]) == pytest.approx(0, abs=1e-6)
    value, grad = entropy_penalty(torch.zeros(1, 5), torch.ones(1), 0.5, 1.0, 1e-3)
    assert float(value) == pytest.approx(1.0)
    assert bool(torch.isfinite(grad).all())


def test_following_the_gradient_spreads_collapsed_codes() -> None:
    weight = torch.randn(16, 64) * 0.05
    weight[0] *= 300  # a few large weights make the scale large, and the others zeros
    before = quantise_weight(weight, LayerQuant())
    value, grad = entropy_penalty(weight, before.row_scale(), 0.5, 1.5, 0.1)
    assert float(value) > 0
    after, _ = entropy_penalty(weight - 50 * grad, before.row_scale(), 0.5, 1.5, 0.1)
    assert float(after) < float(value)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("cfg", [CodesRegulariser(strength=3.0, start=0, ramp=0), EntropyRegulariser(floor=1.585)])
def test_the_gradient_of_all_layers_is_the_mean_times_the_strength(cfg: Any, kept: bool) -> None:
    spec = QuantSpec(LayerQuant(), (("*.o_proj", FLOAT), ("*.k_proj", LayerQuant("binary", groups=2))))
    model = build_decoder(CFG, spec, NormalInit(), 1)
    if kept:
        CodeCache(model)
    regulariser = build_regulariser(cfg, model, spec, 10)
    assert regulariser is not None
    binary = isinstance(cfg, CodesRegulariser)
    assert len(regulariser.layers) == 2 * (6 if binary else 5)
    layers = [layer for layer, _ in regulariser.layers]
    layer = layers[0]
    layer.weight.grad = torch.ones_like(layer.weight)
    value = regulariser.add_gradients(0)
    penalties = [regulariser.penalty(each) for each in layers]
    count = len(penalties)
    assert value is not None
    torch.testing.assert_close(value, cfg.strength * torch.stack([v for v, _ in penalties]).mean())
    torch.testing.assert_close(layer.weight.grad, 1 + penalties[0][1] * cfg.strength / count)
    torch.testing.assert_close(layers[-1].weight.grad, penalties[-1][1] * cfg.strength / count)
    assert model.embed_tokens.weight.grad is None


def test_strength_is_a_pure_function_of_the_step() -> None:
    cfg = CodesRegulariser(strength=8.0, start=0.5, ramp=3)
    assert [strength_at(cfg, step, 10) for step in range(10)] == [0, 0, 0, 0, 0, 2, 4, 6, 8, 8]
    assert strength_at(EntropyRegulariser(strength=5.0), 0, 10) == 5
    model = build_decoder(CFG, QuantSpec(), NormalInit(), 1)
    regulariser = build_regulariser(cfg, model, QuantSpec(), 10)
    assert regulariser is not None
    assert regulariser.add_gradients(4) is None
    assert all(p.grad is None for p in model.parameters())
    assert build_regulariser(NoRegulariser(), model, QuantSpec(), 10) is None


@pytest.mark.parametrize(
    ("cfg", "spec", "sentence"),
    [
        (CodesRegulariser(strength=0.0), QuantSpec(), "strength is 0"),
        (CodesRegulariser(start=20), QuantSpec(), "before trainer.max_steps=10"),
        (CodesRegulariser(ramp=-1), QuantSpec(), "must not be negative"),
        (CodesRegulariser(start=0.5, ramp=20), QuantSpec(), "longer than trainer.max_steps=10, .* never reached"),
        (CodesRegulariser(), QuantSpec(FLOAT), "quant= leaves none"),
        (EntropyRegulariser(), QuantSpec(LayerQuant("binary")), "has none: use none or codes"),
        (EntropyRegulariser(floor=1.6), QuantSpec(), "between 0 and 1.585"),
        (EntropyRegulariser(temperature=0.0), QuantSpec(), "temperature is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(cfg: RegulariserConfig, spec: QuantSpec, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_regulariser(cfg, CFG, spec, 10)


def test_runs_are_regularised_and_continued_bit_for_bit(workspace: Workspace) -> None:
    workspace = InProcess(workspace.folder)
    settings = ("regulariser=codes", "regulariser.start=2", "regulariser.ramp=2", "loss.z_loss=1e-2")
    code, output = workspace.run(*settings, "run_name=whole", "trainer.max_steps=6", "schedule=constant")
    assert code == 0, output
    assert workspace.run(*settings, "run_name=cut", "trainer.max_steps=3", "schedule=constant")[0] == 0
    assert workspace.run(*settings, "run_name=cut", "trainer.max_steps=6", "schedule=constant")[0] == 0
    rows, again = workspace.rows("whole"), workspace.rows("cut")
    names = ("train/loss", "loss/total", "loss/z", "loss/regulariser", "grad_norm", "codes/flips")
    assert [[row[name] for name in names] for row in rows] == [[row[name] for name in names] for row in again]
    assert [bool(row["loss/regulariser"]) for row in rows] == [False, False, True, True, True, True]
    for row in rows:
        parts = [float(row[name] or 0) for name in ("train/loss", "loss/z", "loss/regulariser")]
        assert float(row["loss/total"]) == pytest.approx(sum(parts), rel=1e-5)
    # Without it: the same until it begins, then other weights.
    assert workspace.run("loss.z_loss=1e-2", "run_name=none", "trainer.max_steps=6", "schedule=constant")[0] == 0
    plain = [row["train/loss"] for row in workspace.rows("none")]
    assert plain[:3] == [row["train/loss"] for row in rows[:3]]
    assert plain[3:] != [row["train/loss"] for row in rows[3:]]
    code, output = workspace.run("quant=none", "regulariser=entropy", "run_name=x")
    assert code == 2
    assert "regulariser=entropy acts on quantised layers" in output
