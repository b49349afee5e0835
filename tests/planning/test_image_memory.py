"""What a classifier's estimate says of activations: a closed form for the smallest, and proportion to the batch."""

import pytest

from bitnet_train.nn.config import Norms
from bitnet_train.nn.vision.config import ClassifierConfig, MlpConfig, VitConfig
from bitnet_train.planning.vision import estimate_images, saved_bytes
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from tests.composing import compose_config

SHAPE = {"image_size": 8, "channels": 3, "classes": 10}
MODELS: dict[str, ClassifierConfig] = {
    "mlp": MlpConfig(**SHAPE, hidden=48, layers=4),
    "vit": VitConfig(**SHAPE, hidden=32, layers=2, patch=4, heads=2, ffn=64),
    "vit without sub-norms": VitConfig(**SHAPE, hidden=32, layers=2, patch=4, heads=2, ffn=64, norms=Norms.pre),
}
SPECS = {"ternary": QuantSpec(), "float": QuantSpec(FLOAT), "weights only": QuantSpec(LayerQuant(activation_bits=None))}


def test_two_float_layers_keep_the_activation_and_the_loss() -> None:
    model = MlpConfig(**SHAPE, hidden=48, layers=2, norm=False)
    one, two = (saved_bytes(model, QuantSpec(FLOAT), False, images) for images in (1, 2))
    assert two - one == 4 * 48 + 4 * 10 + 8  # relu's result, the log-probabilities, the label


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("bf16", [True, False])
def test_what_is_kept_grows_with_the_images(model: str, spec: str, bf16: bool) -> None:
    one, two, seven = (saved_bytes(MODELS[model], SPECS[spec], bf16, images) for images in (1, 2, 7))
    assert 0 < two - one <= one
    assert seven - two == 5 * (two - one)


def test_ternary_keeps_less_than_float() -> None:
    assert saved_bytes(MODELS["mlp"], QuantSpec(), True, 4) < saved_bytes(MODELS["mlp"], QuantSpec(FLOAT), True, 4)


def test_the_estimate_counts_one_micro_batch() -> None:
    whole = estimate_images(compose_config("+recipe=digits_vit"), compose_config("+recipe=digits_vit").export.dtype)
    cfg = compose_config("+recipe=digits_vit", f"trainer.micro_batch={whole.batch.micro_batch // 2}")
    half = estimate_images(cfg, cfg.export.dtype)
    assert half.memory.activations["images"] == 4 * 64 * half.batch.micro_batch
    assert {name: 2 * size for name, size in half.memory.activations.items()} == whole.memory.activations
    assert half.memory.master_weights == whole.memory.master_weights
