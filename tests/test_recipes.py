"""Every shipped recipe composes, validates and can be estimated; so do its dense and its binary twin."""

from functools import cache

import pytest
from omegaconf.errors import MissingMandatoryValue

from bitnet_train.config import Config
from bitnet_train.errors import ConfigError
from bitnet_train.export.config import ExportDtype
from bitnet_train.planning.estimate import Estimate, estimate
from bitnet_train.planning.vision import ImageEstimate, estimate_images
from bitnet_train.recipes import config_folder
from bitnet_train.training.optimizers.config import MuonConfig
from bitnet_train.training.schedules.config import TwoStageSchedule
from tests.composing import CATALOGUE, NEEDED, RECIPES, choosing, compose_config


@cache
def composed(*overrides: str) -> Config:
    return compose_config(*overrides)


def figures(*overrides: str) -> Estimate | ImageEstimate:
    cfg = composed(*overrides)
    return (estimate_images if cfg.on_images else estimate)(cfg, cfg.export.dtype)


def test_the_recipes_that_are_promised_exist() -> None:
    assert {"tiny", "small", "llama_cpp_tiny", "125m", "700m", "1_3b", "3b", "2b4t"} <= set(RECIPES)
    assert {"digits_mlp", "digits_vit", "mnist_mlp", "fashion_mnist_vit", "cifar100_vit"} <= set(RECIPES)
    assert {"finetune", "sft", "distill", "distill_continue", "continue_16_to_1_58", "micro"} <= set(RECIPES)
    in_ladders = {f"{ladder}_{size}" for ladder, sizes in CATALOGUE.ladders.items() for size in sizes}
    assert {path.stem for path in config_folder("recipes").glob("*.yaml")} == set(RECIPES) - in_ladders
    assert in_ladders < set(RECIPES)


@pytest.mark.parametrize("recipe", NEEDED)
def test_a_recipe_that_starts_from_a_model_asks_for_it(recipe: str) -> None:
    with pytest.raises((ConfigError, MissingMandatoryValue)) as caught:
        compose_config(f"+recipe={recipe}")
    assert any(f"{key.partition('=')[0]}" in str(caught.value) for key in NEEDED[recipe])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_and_is_quantised(recipe: str) -> None:
    found = figures(*choosing(recipe))
    assert set(found.parameters.linear) == {"binary" if recipe.startswith("b1_") else "ternary"}
    assert found.parameters.quantised > 0
    # The smallest models, and those of the ladder with an untied head, are mostly embedding.
    assert 0.4 < found.parameters.quantised_share < 1
    # Masters and two moments; Muon keeps one of most.
    muon = isinstance(composed(*choosing(recipe)).optimizer, MuonConfig)
    assert found.checkpoint_bytes >= (8 if muon else 12) * found.parameters.total
    assert found.curve[0].step == 0
    assert found.curve[-1].step == found.steps - 1


# Nothing is left on the way to codes where there are none.
DENSE = ("quant=none", "quant/progressive=none")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_dense_twin_differs_in_the_quantisation_only(recipe: str) -> None:
    line = choosing(recipe)
    ternary, dense = figures(*line), figures(*line, *DENSE)
    assert dense.parameters.total == ternary.parameters.total
    assert dense.parameters.quantised == 0
    assert dense.memory.code_buffers == 0
    assert len(dense.exports) == 1
    assert ternary.training_flops == dense.training_flops
    assert composed(*line).optimizer == composed(*line, *DENSE).optimizer


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_binary_twin(recipe: str) -> None:
    found = figures(*choosing(recipe), "quant=binary")
    assert set(found.parameters.linear) == {"binary"}
    assert found.exports[1].packing == "one bit per binary code"
    assert found.exports[1].without_embeddings < found.exports[0].without_embeddings


def test_2b4t_is_the_published_model() -> None:
    found = figures("+recipe=2b4t")
    assert found.parameters.total == 2_412_820_480
    assert found.parameters.linear == {"ternary": 2_084_044_800}
    sizes = {size.packing: size.without_embeddings for size in found.exports}
    assert f"{sizes['2 bits per code'] / 1e9:.2f}" == "0.52"
    assert f"{sizes['five codes a byte'] / 1e9:.2f}" == "0.42"
    assert found.export_dtype == ExportDtype.bfloat16.value
    assert found.tokens == pytest.approx(4e12, rel=1e-6)


def test_2b4t_marks_what_the_paper_does_not_disclose() -> None:
    text = (config_folder("recipes") / "2b4t.yaml").read_text()
    for key in ("lr: 1.2e-3", "betas:", "warmup:", "share: 0.5", "batch_tokens:"):
        line = next(line for line in text.splitlines() if key in line)
        assert "not disclosed" in line, line
    assert isinstance(composed("+recipe=2b4t").schedule, TwoStageSchedule)


def test_the_llama_cpp_recipe_fits_ternary_blocks() -> None:
    model = composed("+recipe=llama_cpp_tiny").decoder
    for width in (model.hidden, model.ffn):
        assert width % 256 == 0
    assert model.tie_embeddings


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_say_where_their_numbers_come_from(recipe: str) -> None:
    text = CATALOGUE.files[f"recipe/{recipe}"].read_text()
    assert text.startswith("#")


@pytest.mark.parametrize("option", ["constant", "linear", "cosine", "wsd"])
def test_every_schedule_can_be_chosen_for_both_rates(option: str) -> None:
    cfg = compose_config("+recipe=tiny", f"schedule={option}", f"weight_decay_schedule={option}")
    assert cfg.schedule.name == cfg.weight_decay_schedule.name == option


@pytest.mark.parametrize("choice", ["clip=none", "clip=percentile", "init=depth_scaled", "logger=wandb", "data=files"])
def test_every_other_variant_can_be_chosen(choice: str) -> None:
    compose_config("+recipe=tiny", choice)
