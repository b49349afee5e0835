"""Qwen2 and Qwen3: our decoder against transformers' models of random weights, and as the start of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.export.huggingface.reader import load_export, read_model
from bitnet_train.export.huggingface.tokenizer_files import write_tokenizer
from bitnet_train.export.initial import fill_weights, read_initial
from bitnet_train.nn.config import Activation, DecoderConfig, NormalInit, Norms, check_decoder
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.nn.kv_cache import KVCache
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec
from tests.export.conftest import edit_json

SIZES: dict[str, Any] = {
    "vocab_size": 416,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
SHAPE: dict[str, Any] = {
    "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 96, "context": 128, "vocab": 416,
    "norms": Norms.pre, "activation": Activation.silu, "norm_eps": 1e-6,
}  # fmt: skip


def checkpoint(family: str, folder: Path, tokenizer: TextTokenizer, tied: bool = False, **more: Any) -> Any:
    """A random model, its norms uneven and its biases not zero, saved to ``folder``."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **SIZES, tie_word_embeddings=tied, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, **more
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.mul_(1 + 0.3 * torch.randn(parameter.shape))
        elif name.endswith("bias") or "embed" in name:
            parameter.data.normal_()
        else:
            parameter.data.normal_(std=0.15)
    model.save_pretrained(folder)
    write_tokenizer(tokenizer, folder, 128)
    return model


CASES = [
    ("Qwen2", {}, {"attention_bias": True}),
    ("Qwen2", {"tied": True}, {"attention_bias": True, "tie_embeddings": True}),
    ("Qwen3", {"head_dim": 16}, {"qk_norm": True}),
    ("Qwen3", {"head_dim": 32}, {"qk_norm": True, "head_width": 32}),
    ("Qwen3", {"head_dim": 8, "tied": True}, {"qk_norm": True, "head_width": 8, "tie_embeddings": True}),
    ("Llama", {"head_dim": 24}, {"head_width": 24}),
]


@pytest.mark.parametrize(("family", "options", "fields"), CASES)
def test_logits_agree_to_1e_5(
    family: str, options: dict[str, Any], fields: dict[str, Any], tmp_path: Path, bpe: TextTokenizer
) -> None:
    theirs = checkpoint(family, tmp_path, bpe, **options)
    imported = read_model(tmp_path)
    theta = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["rope_theta"]
    assert imported.cfg == DecoderConfig(**{**SHAPE, "tie_embeddings": False, "rope_theta": theta, **fields})
    ours = imported.decoder()
    ids = torch.randint(0, 416, (2, 100))
    with torch.no_grad():
        logits, expected = ours(ids), theirs(ids).logits
    assert float((logits - expected).norm() / expected.norm()) < 1e-5
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize(("family", "options", "fields"), CASES)
def test_a_run_starts_from_the_checkpoint(
    family: str, options: dict[str, Any], fields: dict[str, Any], tmp_path: Path, bpe: TextTokenizer
) -> None:
    checkpoint(family, tmp_path, bpe, **options)
    cfg = read_model(tmp_path).cfg
    initial = read_initial(str(tmp_path), cfg, QuantSpec())
    model = Decoder(cfg, QuantSpec())
    fill_weights(model, initial.masters)
    dense, _ = load_export(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)), name
    assert not initial.lacks_sub_norms
    assert not initial.coded
    for key, value in fields.items():
        default = getattr(DecoderConfig(), key)
        wrong = DecoderConfig(**{**cfg.__dict__, key: default if value != default else not value})
        said = "null" if value is None else str(value).lower()
        with pytest.raises(ConfigError, match=rf"is of another model: set .*model\.{key}={said}"):
            read_initial(str(tmp_path), wrong, QuantSpec())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_sliding_window": True}, "sliding windows of attention, which are not read here"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows of attention"),
        ({"layer_types": 3}, "sliding windows of attention"),
        ({"attention_bias": True}, "the model has biases on o_proj or in the FFN"),
        ({"head_dim": "wide"}, "head_dim is 'wide', which is not of type int"),
        ({"head_dim": 0}, "model.head_width is 0; it must be at least 1"),
        ({"head_dim": 15}, "The head dimension 15 .* is odd"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "only plain rotary positions"),
        ({"model_type": "qwen2_moe"}, "only bitnet and llama and qwen2 and qwen3 are read here"),
        ({"model_type": "qwen2", "head_dim": None}, "q_proj.bias is missing|is not part of the model"),
        ({"head_dim": None}, "has the shape"),
    ],
)
def test_what_the_decoder_lacks_is_refused(
    change: dict[str, Any], sentence: str, tmp_path: Path, bpe: TextTokenizer
) -> None:
    checkpoint("Qwen3", tmp_path, bpe, head_dim=32)
    edit_json(tmp_path / "config.json", lambda config: config.update(change))
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_model(tmp_path)
    assert "\n" not in str(caught.value)


PARTS = [{"attention_bias": True}, {"qk_norm": True, "head_width": 32}]
SPECS = [
    QuantSpec(FLOAT),
    QuantSpec(),
    QuantSpec(LayerQuant(activation_bits=None)),
    QuantSpec(LayerQuant(), (("*.k_proj", FLOAT),)),
]


def decoder(parts: dict[str, Any], spec: QuantSpec, **more: Any) -> Decoder:
    model = build_decoder(DecoderConfig(**{**SHAPE, **parts, **more}), spec, NormalInit(std=0.1), 0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
        elif "_norm" in name:
            parameter.data.mul_(1 + 0.3 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("norms", Norms)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("parts", PARTS)
def test_a_cache_gives_the_same_as_the_whole_text(parts: dict[str, Any], spec: QuantSpec, norms: Norms) -> None:
    model = decoder(parts, spec, norms=norms).eval()
    ids = torch.randint(0, 416, (2, 12))
    with torch.no_grad():
        whole = model(ids)
        cache: KVCache = model.new_cache(2, 12)
        steps = torch.cat(
            [model(ids[:, :7], cache=cache), *(model(ids[:, i : i + 1], cache=cache) for i in range(7, 12))], 1
        )
    # A sum in another order may round an activation to the next code.
    tolerance = 1e-5 if spec == SPECS[0] else 5e-2
    assert float((steps - whole).norm() / whole.norm()) < tolerance


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("parts", PARTS)
def test_every_part_gets_a_gradient(parts: dict[str, Any], spec: QuantSpec) -> None:
    model = decoder(parts, spec)
    ids = torch.randint(0, 416, (2, 12))
    torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    new = [(n, p) for n, p in model.named_parameters() if n.endswith("bias") or "q_norm" in n or "k_norm" in n]
    assert len(new) == 2 * (3 if "attention_bias" in parts else 2)
    for name, parameter in new:
        assert parameter.grad is not None, name
        if "k_proj.bias" not in name:  # softmax does not see a common shift of all scores
            assert float(parameter.grad.abs().max()) > 0, name


def test_a_llama_whose_o_proj_has_no_bias_to_speak_of(tmp_path: Path, bpe: TextTokenizer) -> None:
    model = checkpoint("Llama", tmp_path, bpe, attention_bias=True)
    with pytest.raises(
        ConfigError, match=r"layers\.0\.self_attn\.o_proj\.bias is not zero, and the decoder here has no"
    ):
        read_model(tmp_path)
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.data.zero_()
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 416, (2, 100))
    with torch.no_grad():
        torch.testing.assert_close(read_model(tmp_path).decoder()(ids), model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_head_width_needs_no_divisor() -> None:
    check_decoder(DecoderConfig(**{**SHAPE, "hidden": 50, "head_width": 16}))
    with pytest.raises(ConfigError, match=r"choose a divisor of 50 \(or give model\.head_width\)"):
        check_decoder(DecoderConfig(**{**SHAPE, "hidden": 50}))
