"""Kept codes equal fresh ones after every way in which weights change."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bitnet_train.nn.bit_linear import BitLinear, SharedInput
from bitnet_train.nn.code_cache import CodeCache, keep_codes
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from bitnet_train.quant.weights import Codes, quantise_weight

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DecoderConfig(hidden=16, layers=2, heads=4, kv_heads=2, ffn=24, context=16, vocab=30)
# Every sharing situation at once: stacked alike, stacked of two schemes, with a float among them, of unlike bits.
MIXED = QuantSpec(
    LayerQuant(),
    (
        ("layers.1.self_attn.q_proj", LayerQuant("binary", groups="row")),
        ("layers.1.self_attn.k_proj", FLOAT),
        ("layers.1.mlp.up_proj", LayerQuant(groups=4, activation_bits=None)),
        ("layers.0.mlp.down_proj", LayerQuant(activation_bits=None)),
    ),
)
IDS = torch.arange(20).reshape(2, 10)


def decoder(spec: QuantSpec = MIXED, seed: int = 0) -> Decoder:
    return build_decoder(CONFIG, spec, NormalInit(std=0.3), seed)


def bit_layers(model: nn.Module) -> dict[str, BitLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}


def fresh_output(model: Decoder) -> Tensor:
    """The logits of a new model with the same weights and no cache."""
    clean = Decoder(model.cfg, model.spec)
    clean.load_state_dict(model.state_dict())
    return clean(IDS)


def assert_fresh(model: Decoder) -> None:
    """The kept codes, the stacks, and so the logits are those of the weights as they are."""
    for layer in bit_layers(model).values():
        fresh = quantise_weight(layer.weight, layer.quant)
        used = layer.quantised()
        assert torch.equal(used.codes, fresh.codes)
        assert torch.equal(used.scale, fresh.scale)
        assert used.scale.dtype is torch.float32
    for shared in model.modules():
        if isinstance(shared, SharedInput) and shared.codes is not None:
            fresh_codes = [quantise_weight(layer.weight, layer.quant) for layer in shared.bit_layers]
            assert torch.equal(shared.codes, torch.cat([c.codes for c in fresh_codes]))
            assert shared.row_scale is not None
            assert torch.equal(shared.row_scale, torch.cat([c.row_scale() for c in fresh_codes]))
    assert torch.equal(model(IDS), fresh_output(model))


def backward(model: Decoder) -> None:
    model(IDS).float().log_softmax(-1)[..., 0].sum().backward()


OPTIMIZERS: dict[str, Callable[[Decoder], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.5),
    "sgd momentum foreach": lambda m: torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9, foreach=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1),
    "adamw foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, foreach=True),
    "adamw fused": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_codes_are_fresh_after_every_optimizer_step(name: str) -> None:
    model = decoder()
    optimizer = OPTIMIZERS[name](model)
    CodeCache(model, optimizer)
    assert_fresh(model)
    for _ in range(3):
        before = {n: layer.quantised().codes.clone() for n, layer in bit_layers(model).items()}
        for _ in range(2):  # accumulation
            backward(model)
            assert_fresh(model)
        optimizer.step()
        optimizer.zero_grad()
        assert_fresh(model)
        assert any(not torch.equal(before[n], layer.quantised().codes) for n, layer in bit_layers(model).items())


def test_training_with_and_without_the_cache_is_the_same_run() -> None:
    losses = []
    for cached in (True, False):
        model = decoder()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        if cached:
            CodeCache(model, optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:4] == losses[4:]


def test_a_step_through_a_closure_refreshes_too() -> None:
    model = decoder()
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.dim() > 1], lr=0.1, max_iter=2)
    CodeCache(model, optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(IDS).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_fresh(model)


def test_edits_through_data_need_a_refresh() -> None:
    model = decoder()
    cache = CodeCache(model)
    for layer in bit_layers(model).values():
        layer.weight.data.mul_(-1)  # moves no version counter
    stale = model(IDS)
    assert not torch.equal(stale, fresh_output(model))  # so the test can tell
    cache.refresh()
    assert_fresh(model)


def test_loading_a_state_dict_refreshes() -> None:
    model = decoder()
    CodeCache(model)
    model.load_state_dict(decoder(seed=1).state_dict())
    assert_fresh(model)
    model.load_state_dict(decoder(seed=2).state_dict(), assign=True)
    assert_fresh(model)


def test_loading_through_a_parent_module_refreshes() -> None:
    model = decoder()
    CodeCache(model)
    parent = nn.ModuleDict({"decoder": model})
    parent.load_state_dict(nn.ModuleDict({"decoder": decoder(seed=1)}).state_dict())
    assert_fresh(model)


def test_a_step_after_loading_writes_into_the_stacks() -> None:
    model = decoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    CodeCache(model, optimizer)
    model.load_state_dict(decoder(seed=1).state_dict())
    backward(model)
    optimizer.step()
    assert_fresh(model)


def test_a_refresh_after_a_move_reaches_the_stacks() -> None:
    model = decoder()
    cache = CodeCache(model)
    model._apply(torch.clone)  # as a move to a device: the layers' codes are no longer views of the stack
    for layer in bit_layers(model).values():
        layer.weight.data.mul_(-1)
    cache.refresh()
    assert_fresh(model)


def test_a_second_optimizer_can_be_attached() -> None:
    model = decoder()
    matrices = [layer.weight for layer in bit_layers(model).values()]
    first, second = (torch.optim.SGD(part, lr=1.0) for part in (matrices[::2], matrices[1::2]))
    cache = CodeCache(model, first)
    cache.attach(second)
    backward(model)
    for optimizer in (first, second):
        optimizer.step()
        assert_fresh(model)


def test_release_forgets_codes_and_hooks() -> None:
    model = decoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    cache = CodeCache(model, optimizer)
    cache.release()
    assert all(layer.kept is None for layer in bit_layers(model).values())
    assert all(s.codes is None and s.row_scale is None for s in model.modules() if isinstance(s, SharedInput))
    for layer in bit_layers(model).values():
        layer.weight.data.mul_(-1)
    assert_fresh(model)
    backward(model)
    optimizer.step()
    model.load_state_dict(decoder(seed=1).state_dict())
    assert all(layer.kept is None for layer in bit_layers(model).values())  # no hook put them back
    assert_fresh(model)


def test_the_state_dict_holds_no_codes() -> None:
    model = decoder()
    names = list(model.state_dict())
    CodeCache(model)
    assert list(model.state_dict()) == names
    assert len(list(model.named_parameters())) == len(names)


def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model = decoder()
    CodeCache(model)
    other = copy.deepcopy(model)
    assert_fresh(other)
    before = model(IDS)
    other.load_state_dict(decoder(seed=1).state_dict())
    assert_fresh(other)
    assert torch.equal(model(IDS), before)
    assert_fresh(model)


def test_a_deep_copy_with_a_cache_of_its_own_is_refreshed_by_its_optimizer() -> None:
    model = decoder()
    CodeCache(model)
    other = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    CodeCache(other, optimizer)
    backward(other)
    optimizer.step()
    assert_fresh(other)
    assert_fresh(model)


def test_a_deep_copy_whose_weights_are_averaged_is_not_stale() -> None:
    # What an exponential moving average of the weights does: copy once, then write the parameters.
    model = decoder()
    CodeCache(model)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(-1).add_(torch.randn_like(parameter))
    assert_fresh(average)


def test_a_cached_model_pickles() -> None:
    model = decoder()
    CodeCache(model)
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other(IDS), model(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scales_stay_float32_when_the_model_changes_type(dtype: torch.dtype) -> None:
    model = decoder(QuantSpec())
    cache = CodeCache(model)
    model.to(dtype)
    cache.refresh()
    for layer in bit_layers(model).values():
        fresh = quantise_weight(layer.weight, layer.quant)
        assert layer.quantised().scale.dtype is torch.float32
        assert torch.equal(layer.quantised().scale, fresh.scale)
        assert torch.equal(layer.quantised().codes, fresh.codes)
    stacks = [m.row_scale for m in model.modules() if isinstance(m, SharedInput)]
    assert all(scale is None or scale.dtype is torch.float32 for scale in stacks)


def test_codes_made_in_inference_mode_can_still_be_trained_with() -> None:
    model = decoder()
    with torch.inference_mode():
        CodeCache(model)
    backward(model)


def test_a_cache_of_a_model_without_quantised_layers_does_nothing() -> None:
    model = decoder(QuantSpec(FLOAT))
    cache = CodeCache(model, torch.optim.SGD(model.parameters(), lr=0.1))
    cache.refresh(measure=True)
    assert cache.statistics is None


# --- statistics ---


def test_statistics_equal_a_naive_count() -> None:
    model = decoder()
    optimizer = torch.optim.SGD([layer.weight for layer in bit_layers(model).values()], lr=0.3)
    cache = CodeCache(model, optimizer)
    for _ in range(2):
        before = torch.cat([layer.quantised().codes.flatten().clone() for layer in bit_layers(model).values()])
        backward(model)
        cache.measure_next()
        optimizer.step()
        optimizer.zero_grad()
        after = torch.cat([quantise_weight(x.weight, x.quant).codes.flatten() for x in bit_layers(model).values()])
        assert cache.statistics is not None
        assert cache.statistics.total == len(after)
        assert cache.statistics.zero_share() == pytest.approx((after == 0).double().mean().item())
        assert cache.statistics.flip_rate() == pytest.approx((after != before).double().mean().item())
        assert 0 < cache.statistics.flip_rate() < 1
        assert_fresh(model)


def test_statistics_are_only_counted_when_asked() -> None:
    model = decoder()
    cache = CodeCache(model)
    cache.refresh()
    assert cache.statistics is None
    cache.measure_next()
    cache.refresh()
    first = cache.statistics
    assert first is not None
    assert first.flip_rate() == 0
    for layer in bit_layers(model).values():
        layer.weight.data.mul_(-1)
    cache.refresh()
    assert cache.statistics is first


# --- codes without weights ---


def exported(model: Decoder) -> dict[str, Codes]:
    return {name: Codes(*(t.clone() for t in layer.quantised())) for name, layer in bit_layers(model).items()}


def test_kept_codes_replace_the_master_weights() -> None:
    model, other = decoder(), decoder(seed=1)
    other.load_state_dict(model.state_dict())
    wanted = model(IDS)
    codes = exported(model)
    for layer in bit_layers(other).values():
        layer.weight.data.normal_()
    keep_codes(other, codes)
    assert torch.equal(other(IDS), wanted)
    assert all(layer.weight.numel() == 0 for layer in bit_layers(other).values())
    with torch.inference_mode():
        cache = other.new_cache(2, 10)
        assert torch.allclose(other(IDS, cache=cache), wanted, atol=1e-5)


def test_missing_and_misshapen_codes_are_refused() -> None:
    codes = exported(decoder())
    name = "layers.0.self_attn.q_proj"
    with pytest.raises(KeyError, match="q_proj"):
        keep_codes(decoder(), {k: v for k, v in codes.items() if k != name})
    with pytest.raises(ValueError, match=r"q_proj: codes of shape \(4, 16\)"):
        keep_codes(decoder(), {**codes, name: Codes(codes[name].codes[:4], codes[name].scale)})


def test_codes_of_no_layer_are_refused() -> None:
    codes = exported(decoder())
    with pytest.raises(KeyError, match="nowhere"):
        keep_codes(decoder(), {**codes, "layers.9.nowhere": codes["layers.0.self_attn.q_proj"]})
