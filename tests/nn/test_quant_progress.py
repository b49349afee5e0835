"""A decoder put into the states of progressive quantisation, and its kept codes after a change of the quantisers."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bitnet_train.nn.bit_linear import BitLinear, SharedInput
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.nn.progress import QuantProgress, block_number
from bitnet_train.quant.config import LayerwiseProgressive
from bitnet_train.quant.progress import QuantState, quant_state
from bitnet_train.quant.spec import FLOAT, LateInputs, LayerQuant, QuantSpec
from bitnet_train.quant.weights import quantise_weight

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DecoderConfig(hidden=16, layers=3, heads=4, kv_heads=2, ffn=24, context=16, vocab=30)
SPEC = QuantSpec(LayerQuant(), (("layers.1.mlp.up_proj", FLOAT), ("*.v_proj", LayerQuant("binary", groups="row"))))
IDS = torch.arange(20).reshape(2, 10)


def decoder(spec: QuantSpec = SPEC) -> Decoder:
    return build_decoder(CONFIG, spec, NormalInit(std=0.3), 0)


def bit_layers(model: nn.Module) -> dict[str, BitLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}


def with_weights_of(model: Decoder, spec: QuantSpec) -> Decoder:
    """A model of its own under ``spec``, fresh in everything but the weights."""
    other = Decoder(model.cfg, spec)
    other.load_state_dict(model.state_dict())
    return other


def assert_kept(model: Decoder) -> None:
    """What is kept is what the weights give under each layer's quantiser of now."""
    for layer in bit_layers(model).values():
        fresh = quantise_weight(layer.weight, layer.quant)
        assert layer.kept is not None
        assert torch.equal(layer.kept.codes, fresh.codes)
        assert torch.equal(layer.kept.scale, fresh.scale)
    for shared in model.modules():
        if isinstance(shared, SharedInput) and shared.bit_layers:
            assert (shared.kept is not None) is shared.stackable
            if shared.kept is not None:
                assert torch.equal(shared.kept.codes, torch.cat([x.quantised().codes for x in shared.bit_layers]))
                assert shared.kept.largest == max(x.quant.largest_code for x in shared.bit_layers)


def test_strength_0_is_the_dense_model_and_strength_1_the_integers() -> None:
    model = decoder()
    wanted = model(IDS)
    progress = QuantProgress(model, seed=1)
    progress.apply(QuantState(SPEC, (0.0,) * 3), 0, None)
    assert torch.equal(model(IDS), with_weights_of(model, QuantSpec(FLOAT))(IDS))
    progress.apply(QuantState(SPEC, (1.0,) * 3), 1, None)
    # A rounding may move an input of a later layer by a code.
    assert (model(IDS) - wanted).norm() < 0.05 * wanted.norm()
    progress.apply(QuantState(SPEC), 2, None)
    assert torch.equal(model(IDS), wanted)


def test_blocks_have_strengths_of_their_own() -> None:
    model = decoder()
    QuantProgress(model, seed=1).apply(QuantState(SPEC, (0.0, 0.5, 1.0)), 0, None)
    for name, layer in bit_layers(model).items():
        wanted = {"0": 0.0, "1": 0.5, "2": 1.0}[name.split(".")[1]]
        assert layer.weight_blend is not None
        assert layer.weight_blend.item() == wanted
        assert layer.input_blend is layer.weight_blend


def test_strengths_stay_in_their_tensors_and_outlive_a_move() -> None:
    model = decoder()
    progress = QuantProgress(model, seed=1)
    progress.apply(QuantState(SPEC, (0.1,) * 3), 0, None)
    tensors = [layer.weight_blend for layer in bit_layers(model).values()]
    progress.apply(QuantState(SPEC, (0.2,) * 3), 1, None)
    assert all(a is layer.weight_blend for a, layer in zip(tensors, bit_layers(model).values(), strict=True))
    # As a move to another device: every tensor of every layer is copied for itself.
    model._apply(torch.clone)
    for layer in bit_layers(model).values():
        layer.blend(layer.weight_blend.clone(), layer.input_blend.clone())  # type: ignore[union-attr]
    progress.apply(QuantState(SPEC, (0.6,) * 3), 2, None)
    assert all(layer.weight_blend.item() == pytest.approx(0.6) for layer in bit_layers(model).values())  # type: ignore[union-attr]
    assert all(layer.input_blend is layer.weight_blend for layer in bit_layers(model).values())
    first = [layer.weight_blend for name, layer in bit_layers(model).items() if name.startswith("layers.0.")]
    assert all(value is first[0] for value in first)  # one quantised input again


def test_layerwise_states_reach_the_right_blocks() -> None:
    model = decoder()
    progress = QuantProgress(model, seed=1)
    for step in range(10):
        state = quant_state(LayerwiseProgressive(until=8), SPEC, step, 10, 3)
        progress.apply(state, step, None)
        for name, layer in bit_layers(model).items():
            strength = 1.0 if state.strengths is None else state.strengths[block_number(name, 3)]
            assert (1.0 if layer.weight_blend is None else layer.weight_blend.item()) == strength


def test_the_block_of_a_name() -> None:
    assert [block_number(n, 4) for n in ("layers.2.mlp.up_proj", "layers.0.x", "head", "layers.x.y", "layers")] == [
        2, 0, 3, 3, 3,
    ]  # fmt: skip


# --- noise ---


def masks(seed: int, step: int, rate: float = 0.5, drawn: int = 0) -> dict[str, Tensor]:
    model = decoder()
    torch.randn(drawn + 1)  # whatever else draws random numbers
    QuantProgress(model, seed).apply(QuantState(SPEC, noise=rate), step, None)
    found = {}
    for name, layer in bit_layers(model).items():
        assert layer.weight_blend is not None
        assert layer.input_blend is not None
        assert layer.input_blend.item() == 1.0  # inputs are quantised whole
        found[name] = layer.weight_blend
    return found


def test_masks_are_a_function_of_seed_and_step() -> None:
    first = masks(3, 5)
    for again in (masks(3, 5), masks(3, 5, drawn=1000)):
        assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (masks(3, 6), masks(4, 5)):
        assert all(not torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(first["layers.0.self_attn.q_proj"], first["layers.0.self_attn.o_proj"])
    assert not torch.equal(first["layers.0.mlp.gate_proj"], first["layers.0.mlp.up_proj"])


def test_masks_after_other_steps_are_the_same() -> None:
    model, first = decoder(), masks(3, 5)
    progress = QuantProgress(model, 3)
    for step in range(6):
        progress.apply(QuantState(SPEC, noise=0.5), step, None)
    for name, layer in bit_layers(model).items():
        assert layer.weight_blend is not None
        assert torch.equal(layer.weight_blend, first[name])


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_of_a_mask_is_the_rate(rate: float) -> None:
    drawn = torch.cat([mask.flatten() for step in range(10) for mask in masks(0, step, rate).values()])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn.mean().item() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / len(drawn)) ** 0.5)


@pytest.mark.parametrize("seed", [-1, 2**40, 2**62])
def test_any_seed_gives_masks(seed: int) -> None:
    assert 0 < torch.cat([m.flatten() for m in masks(seed, 10**6).values()]).mean() < 1


# --- kept codes ---


@pytest.mark.parametrize("cached", [False, True])
def test_bits_that_fall_give_the_model_of_their_stage(cached: bool) -> None:
    model = decoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cache = CodeCache(model, optimizer) if cached else None
    progress = QuantProgress(model, seed=1)
    for step, bits in enumerate((8, 8, 4, 3, None)):
        progress.apply(QuantState(replace(SPEC, stage_bits=bits)), step, cache)
        if cached:
            assert_kept(model)
        assert {layer.quant.bits for layer in bit_layers(model).values()} == {bits}
        assert torch.equal(model(IDS), with_weights_of(model, replace(SPEC, stage_bits=bits))(IDS))
        model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if cached:
            assert_kept(model)


@pytest.mark.parametrize("cached", [False, True])
def test_late_inputs_take_stacks_apart_and_put_them_together(cached: bool) -> None:
    four = (("activation_bits", 4), ("activation_statistic", "absmean"))
    late = replace(SPEC, late=(LateInputs("*.q_proj", 2, four), LateInputs("*", 4, four)))
    model = decoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cache = CodeCache(model, optimizer) if cached else None
    progress = QuantProgress(model, seed=1)
    qkv = model.layers[0].self_attn.qkv
    for step in range(6):
        progress.apply(QuantState(late.at(step, 100)), step, cache)
        assert qkv.stackable is (step not in (2, 3))
        if cached:
            assert_kept(model)
        assert torch.equal(model(IDS), with_weights_of(model, late.at(step, 100))(IDS))
        model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if cached:
            assert_kept(model)


def test_nothing_is_derived_anew_while_the_quantisers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    cache = CodeCache(model)
    progress = QuantProgress(model, seed=1)
    calls: list[int] = []
    monkeypatch.setattr(CodeCache, "rebuild", lambda self: calls.append(1))
    progress.apply(QuantState(SPEC, (0.5,) * 3), 0, cache)
    progress.apply(QuantState(SPEC), 1, cache)
    assert not calls
    progress.apply(QuantState(replace(SPEC, stage_bits=8)), 2, cache)
    assert len(calls) == 1


def test_the_cache_of_a_blended_model_stays_fresh() -> None:
    model = decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    cache = CodeCache(model, optimizer)
    QuantProgress(model, seed=1).apply(QuantState(SPEC, (0.5,) * 3), 0, cache)
    for _ in range(2):
        model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_kept(model)


def test_compiled_code_goes_on_while_only_strengths_change() -> None:
    model = decoder()
    progress = QuantProgress(model, seed=1)
    cache = CodeCache(model)
    progress.apply(QuantState(SPEC, (0.1,) * 3), 0, cache)
    torch._dynamo.reset()
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(1)
        return graph.forward

    compiled = torch.compile(model.hidden_states, backend=count, fullgraph=True)
    for step, strength in enumerate((0.1, 0.4, 0.9)):
        progress.apply(QuantState(SPEC, (strength,) * 3), step, cache)
        assert torch.allclose(compiled(IDS), model.hidden_states(IDS), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
