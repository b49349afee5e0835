"""Our decoder and transformers' models with the same random float weights: quantisation off, float32."""

import pytest
import torch

from bitnet_train.export.huggingface.model_config import hf_name
from bitnet_train.nn.config import Activation, NormalInit, Norms
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import FLOAT, QuantSpec
from tests.export.conftest import decoder_config

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("norms", "activation"),
    [
        (Norms.pre_sub, Activation.relu2),
        (Norms.pre_sub, Activation.silu),
        (Norms.pre, Activation.silu),
        (Norms.pre, Activation.relu2),
    ],
)
def test_logits_agree_to_1e_5(norms: Norms, activation: Activation, kv_heads: int, tied: bool) -> None:
    cfg = decoder_config(norms=norms, activation=activation, kv_heads=kv_heads, tie_embeddings=tied)
    ours = build_decoder(cfg, QuantSpec(FLOAT), NormalInit(std=0.1), seed=1).eval()
    for name, parameter in ours.named_parameters():
        if "norm" in name:
            parameter.data.mul_(1 + 0.3 * torch.randn(parameter.shape))
    family = "BitNet" if norms is Norms.pre_sub else "Llama"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=cfg.vocab, hidden_size=cfg.hidden, intermediate_size=cfg.ffn, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=kv_heads, hidden_act=activation.value,
        max_position_embeddings=cfg.context, rms_norm_eps=cfg.norm_eps, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    state = {hf_name(name): tensor for name, tensor in ours.state_dict().items()}
    result = theirs.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}
    ids = torch.randint(0, cfg.vocab, (2, 100))
    with torch.no_grad():
        logits, expected = ours(ids), theirs(ids).logits
    assert float((logits - expected).norm() / expected.norm()) < 1e-5
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5
