"""Who takes part, and that each model is what its name says."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from bitnet_train.benchmarking.contenders import Contender, line_up
from bitnet_train.benchmarking.step import TrainingStep, compiled_alone
from bitnet_train.benchmarking.textbook import TextbookBitLinear
from bitnet_train.config import Config
from bitnet_train.errors import ConfigError
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.config import ActivationCheckpointing
from bitnet_train.nn.decoder import Block
from bitnet_train.validation import with_overrides
from tests.benchmarking.conftest import SMALL
from tests.composing import compose_config


def named(cfg: Config, *names: str) -> list[Contender]:
    return line_up(cfg, names or None, {}).contenders


def count(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(m, kind) for m in module.modules())


def first_step(contender: Contender) -> tuple[float, TrainingStep]:
    step = TrainingStep(contender)
    return float(step.run(0, step.batches(0))), step


def test_every_baseline_runs_or_says_why(small: Config) -> None:
    line = line_up(small, None, {})
    names = [c.name for c in line.contenders]
    assert names[:3] == ["ternary", "dense", "textbook_fp32_eager"]
    assert "compilation is off" in line.not_measured["textbook_bf16_compiled"]
    assert set(names) | set(line.not_measured) >= {"fla", "onebitllms", "torchao_float8", "torchao_int8_mixed"}


def test_a_recipe_that_compiles_has_compiled_and_eager_twins() -> None:
    line = line_up(compose_config(*SMALL[:-3], "trainer.compile=true"), None, {})
    compiled = {c.name: c.compiled for c in line.contenders}
    assert compiled["ternary"]
    assert compiled["dense"]
    assert compiled["textbook_bf16_compiled"]
    assert not compiled["dense_eager"]
    assert not compiled["textbook_fp32_eager"]


def test_the_dense_twin_has_no_bit_linear_and_the_same_weights(small: Config) -> None:
    ternary, dense = (c.decoder() for c in named(small, "ternary", "dense"))
    assert count(ternary, BitLinear) == 14
    assert count(dense, BitLinear) == 0
    state = dense.state_dict()
    assert state.keys() == ternary.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in ternary.state_dict().items())


@pytest.mark.parametrize("norms", ["pre_sub", "pre"])
def test_the_textbook_step_computes_what_ours_does(norms: str) -> None:
    gain = ["init.sub_norm_gain=1"] if norms == "pre" else []
    cfg = compose_config(*SMALL, "trainer.precision=32-true", f"model.norms={norms}", *gain)
    ours, textbook = (first_step(c) for c in named(cfg, "ternary", "textbook_fp32_eager"))
    assert count(textbook[1].decoder, TextbookBitLinear) == 14
    assert textbook[0] == pytest.approx(ours[0], rel=1e-4)
    theirs = dict(textbook[1].decoder.named_parameters())
    for name, parameter in ours[1].decoder.named_parameters():
        gradient = theirs[name].grad
        assert parameter.grad is not None
        assert gradient is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=2e-2, atol=1e-4)


def test_layers_that_the_recipe_leaves_float_are_float_in_the_textbook() -> None:
    cfg = compose_config(
        *SMALL, "trainer.precision=32-true", 'quant.overrides=[{pattern:"layers.0.*_proj",scheme:float}]'
    )
    (ours, _), (textbook, step) = (first_step(c) for c in named(cfg, "ternary", "textbook_fp32_eager"))
    assert count(step.decoder, TextbookBitLinear) == 7
    assert textbook == pytest.approx(ours, rel=1e-4)


def test_torchao_trains_on_a_cpu(small: Config) -> None:
    pytest.importorskip("torchao")
    (contender,) = named(small, "torchao")
    assert contender.precision == "32-true"
    assert "float32 and eager" in contender.about
    step = TrainingStep(contender)
    kinds = {type(p.data).__name__ for name, p in step.decoder.named_parameters() if name.endswith("_proj.weight")}
    assert kinds == {"BitNetTrainingLinearWeight"}
    before = step.decoder.get_parameter("layers.0.mlp.up_proj.weight").detach().clone()
    assert step.run(0, step.batches(0)).isfinite()
    assert not torch.equal(step.decoder.get_parameter("layers.0.mlp.up_proj.weight").detach(), before)


def test_a_step_updates_weights_and_codes_and_is_the_same_for_everyone(small: Config) -> None:
    contenders = named(small, "ternary", "dense")
    steps = [TrainingStep(c) for c in contenders]
    assert all(torch.equal(a, b) for a, b in zip(steps[0].batches(5), steps[1].batches(5), strict=True))
    assert not torch.equal(steps[0].batches(5)[0], steps[0].batches(6)[0])
    assert [tuple(b.shape) for b in steps[0].batches(0)] == [(2, 33), (2, 33)]
    layer = steps[0].decoder.get_submodule("layers.0.mlp.up_proj")
    assert isinstance(layer, BitLinear)
    for number in range(3):
        steps[0].run(number, steps[0].batches(number))
    kept = layer.kept
    assert kept is not None
    layer.keep(None)
    assert torch.equal(layer.quantised().codes, kept.codes)


@pytest.mark.parametrize("name", ["ternary", "dense", "textbook_fp32_eager"])
def test_every_contender_checkpoints_activations_as_the_recipe_does(small: Config, name: str) -> None:
    (contender,) = named(with_overrides(small, ["trainer.activation_checkpointing=selective"], "here"), name)
    blocks = [module for module in contender.decoder().modules() if isinstance(module, Block)]
    assert {block.checkpointing for block in blocks} == {ActivationCheckpointing.selective}


def test_variants_differ_from_the_recipe_in_their_overrides_only(small: Config) -> None:
    varied = with_overrides(small, ["quant.gradient.dw=int8", "clip=none", "optimizer.lr=0.5"], "here")
    assert (varied.quant.gradient.dw.value, varied.clip.name, varied.optimizer.lr) == ("int8", "none", 0.5)
    assert small.quant.gradient.dw.value == "auto"
    changed = {key: getattr(small, key) for key in ("quant", "clip", "optimizer", "benchmark")}
    assert replace(varied, **changed) == small
    (contender,) = line_up(small, ["fla"], {"mine": varied}).contenders
    assert (contender.name, contender.cfg) == ("mine", varied)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["quant.gradient.dw=fp8"], "quant.gradient.dw=fp8 is not supported"),
        (["quant.gradiant.dw=int8"], "gradiant"),
        (["model.hidden=33"], "does not divide"),
        (["paths.runs=x"], "no key=value setting of a run"),
        (["clip"], "no key=value setting of a run"),
    ],
)
def test_a_wrong_variant_is_refused_by_name(small: Config, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=r"^here: ") as caught:
        with_overrides(small, overrides, "here")
    assert words in str(caught.value)


def test_a_dense_recipe_has_nothing_to_compare() -> None:
    with pytest.raises(ConfigError, match="quantises nothing"):
        line_up(compose_config(*SMALL, "quant=none"), None, {})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("benchmark.baselines=[dence]", "Did you mean 'dense'"),
        ("benchmark.baselines=[]", "is empty"),
        ("benchmark.baselines=[dense,dense]", "twice"),
        ("benchmark.rounds=0", "benchmark.rounds is 0"),
        ("benchmark.warmup=0", "benchmark.warmup is 0"),
        ("benchmark.shapes=[[8]]", "pairs"),
        ("benchmark.shapes=[]", "pairs"),
        ("benchmark.tokens=[0]", "positive"),
        ("benchmark.variants=[{name:dense,overrides:[seed:2]}]", "taken"),
        ("benchmark.variants=[{name:x}]", "no overrides"),
        ('benchmark.variants=[{name:"a b",overrides:["seed=2"]}]', "letters"),
        ('benchmark.variants=[{name:x,overrides:["sead=2"]}]', "benchmark.variants, x"),
    ],
)
def test_bad_settings_are_refused_at_composition(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(*SMALL, override)
    assert words in str(caught.value)


def test_compiled_contenders_share_no_code_object() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    wrapped: list[Any] = [compiled_alone(double, name) for name in ("a", "b")]
    codes = [w._torchdynamo_orig_callable.__code__ for w in wrapped]
    assert codes[0] is not codes[1]
    assert codes[0] != codes[1]
