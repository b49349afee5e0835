"""A conversion that goes wrong anywhere changes nothing at all."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_train.errors import ConversionError
from bitnet_train.nn import convert as module_under_test
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.convert import convert
from bitnet_train.nn.convert_checks import Bounds
from bitnet_train.quant.activations import quantise_tokens
from tests.nn.convert_models import IDS, IMAGES, MODELS, Before, llama, vit

pytestmark = pytest.mark.usefixtures("one_thread")


def _transposed(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().t().contiguous() if parameter.dim() == 2 else parameter.detach().clone())


def _rounded(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().half().to(parameter.dtype))


def _thawed(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=not parameter.requires_grad)


def _aliased_and_zeroed(parameter: nn.Parameter) -> nn.Parameter:
    copied = nn.Parameter(parameter.detach().clone())
    copied.data.zero_()
    return copied


def _raises(parameter: nn.Parameter) -> nn.Parameter:
    raise RuntimeError("out of paper")


BROKEN = {
    "transposed": (_transposed, r"checksum: the bytes of weight|shape of weight"),
    "rounded": (_rounded, "checksum: the bytes of (weight|bias)"),
    "zeroed": (_aliased_and_zeroed, "checksum: the bytes of weight"),
    "double": (
        lambda p: nn.Parameter(p.detach().double()),
        r"type of weight: torch\.float64 instead of torch\.float32",
    ),
    "thawed": (_thawed, "requires_grad of weight: False instead of True"),
    "raises": (_raises, r"the transfer failed \(RuntimeError: out of paper\)"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("kind", MODELS)
def test_a_broken_transfer_changes_nothing(kind: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, examples = MODELS[kind]
    model = build()
    before = Before(model)
    broken, sentence = BROKEN[fault]
    monkeypatch.setattr(module_under_test, "copy_parameter", broken)
    with pytest.raises(ConversionError, match=sentence) as caught:
        convert(model, examples=examples)
    assert str(caught.value).split(":")[0] in dict(model.named_modules())
    assert caught.value.exit_code == 4
    before.check()


def test_a_fault_in_the_last_layer_takes_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before, copied, real = Before(model), [], module_under_test.copy_parameter

    def last_is_wrong(parameter: nn.Parameter) -> nn.Parameter:
        copied.append(parameter)
        fresh = real(parameter)
        if len(copied) == 14:
            fresh.data[0, 0] += 1
        return fresh

    monkeypatch.setattr(module_under_test, "copy_parameter", last_is_wrong)
    with pytest.raises(ConversionError, match=r"model\.layers\.1\.mlp\.down_proj: checksum"):
        convert(model)
    before.check()


@pytest.fixture
def patched_bit_linear(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    real = BitLinear.forward

    def patch(forward: Callable[..., Any]) -> None:
        # Broken while it quantises; with quantisation off it is the plain layer.
        either = lambda self, x: forward(self, x) if self.weight_blend is None else real(self, x)  # noqa: E731
        monkeypatch.setattr(BitLinear, "forward", either)

    return patch


def test_a_dropped_bias_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    before, real = Before(model), module_under_test._take_along

    def drop(old: nn.Linear, new: nn.Linear) -> None:
        real(old, new)
        new.bias = None

    monkeypatch.setattr(module_under_test, "_take_along", drop)
    with pytest.raises(ConversionError, match="parameters: bias is not in both layers"):
        convert(model, examples=IMAGES)
    before.check()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_found(value: float) -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    before = Before(model)
    with pytest.raises(ConversionError, match=r"layers\.1\.mlp\.up_proj: finite: weight holds NaN or infinity"):
        convert(model)
    before.check()


@pytest.mark.parametrize(
    ("forward", "sentence"),
    [
        # The statistics of a much copied early package: no scale on the way back.
        (
            lambda self, x: quantise_tokens(x).codes.float() @ self.quantised().codes.float().t(),
            "statistics: the variance",
        ),
        (lambda self, x: F.linear(x, self.weight) * 0, "statistics: the variance"),
        (lambda self, x: F.linear(x, self.weight) + 50, "statistics: the mean of its outputs is 50"),
        (lambda self, x: F.linear(x, self.weight) * math.nan, "finite: its quantised outputs are not"),
    ],
)
def test_outputs_of_a_broken_layer_are_found(
    forward: Callable[..., Any], sentence: str, patched_bit_linear: Callable[[Callable[..., Any]], None]
) -> None:
    model = llama().train()
    before = Before(model)
    patched_bit_linear(forward)
    with pytest.raises(ConversionError, match=r"^model\.layers\.0\.self_attn\.q_proj: " + sentence):
        convert(model, examples=IDS)
    before.check()


def test_a_difference_with_quantisation_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = Before(model)

    class Unhelpful:
        def __init__(self, model: nn.Module) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(module_under_test, "unquantised", Unhelpful)
    with pytest.raises(ConversionError, match=r"layers\.0\.self_attn\.q_proj: outputs: with quantisation off they"):
        convert(model, examples=IDS)
    before.check()


def test_bounds_can_be_set() -> None:
    model = llama()
    before = Before(model)
    with pytest.raises(ConversionError, match="statistics: the variance of its outputs is"):
        convert(model, examples=IDS, bounds=Bounds(variance=1.01))
    before.check()


class PastItsLayers(nn.Module):
    """Uses the weight of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)


def test_layers_that_the_model_runs_past_are_found() -> None:
    model = PastItsLayers()
    before = Before(model)
    with pytest.raises(ConversionError, match="none of the layers is called"):
        convert(model, examples=[torch.randn(2, 8)])
    before.check()
    both = nn.Sequential(nn.Linear(8, 8), PastItsLayers())
    report = convert(both, examples=[torch.randn(2, 8)])
    assert report.outputs is not None
    assert report.outputs.unreached == ["1.layer"]


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = Before(model)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module_under_test, "compare_outputs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(model, examples=IDS)
    before.check()


def test_a_model_that_fails_on_its_examples_is_not_touched() -> None:
    model = llama()
    before = Before(model)
    with pytest.raises(ValueError, match="specify exactly one"):
        convert(model, examples={"no_such_argument": 1})
    before.check()
