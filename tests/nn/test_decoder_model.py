"""The decoder against transformers, and its cache, masks, types and limits."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet_train.errors import ConfigError
from bitnet_train.nn.config import Activation, DecoderConfig, NormalInit, Norms, ResidualDtype, check_decoder
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.nn.kv_cache import KVCache
from bitnet_train.nn.rotary import negate_first_half, rotary_table, rotate
from bitnet_train.quant.spec import FLOAT, LayerQuant, QuantSpec

pytestmark = pytest.mark.usefixtures("one_thread")

BASE = DecoderConfig(hidden=32, layers=3, heads=4, kv_heads=2, ffn=56, context=24, vocab=61)
TERNARY, DENSE = QuantSpec(), QuantSpec(FLOAT)


def make(spec: QuantSpec = DENSE, seed: int = 0, std: float = 0.15, **fields: Any) -> Decoder:
    """A decoder with large random weights and random norm gains, so that every part matters."""
    model = build_decoder(dataclasses.replace(BASE, **fields), spec, NormalInit(std=std), seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


def ids(batch: int = 2, tokens: int = 20, seed: int = 0) -> Tensor:
    return torch.randint(0, BASE.vocab, (batch, tokens), generator=torch.Generator().manual_seed(seed))


# --- against transformers ---


def transformers_twin(model: Decoder) -> nn.Module:
    from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM

    cfg = model.cfg
    kinds = {Norms.pre_sub: (BitNetConfig, BitNetForCausalLM), Norms.pre: (LlamaConfig, LlamaForCausalLM)}
    config_type, model_type = kinds[cfg.norms]
    twin = model_type(config_type(
        vocab_size=cfg.vocab, hidden_size=cfg.hidden, intermediate_size=cfg.ffn, num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, hidden_act=cfg.activation.value,
        max_position_embeddings=cfg.context, rms_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, bos_token_id=0, eos_token_id=0,
    )).eval()  # fmt: skip
    state = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in model.state_dict().items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if cfg.tie_embeddings else set())
    twin.tie_weights()
    return twin


@pytest.mark.parametrize("norms", [Norms.pre_sub, Norms.pre])
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_float_decoder_is_transformers(norms: Norms, activation: Activation, tied: bool, kv_heads: int) -> None:
    model = make(norms=norms, activation=activation, tie_embeddings=tied, kv_heads=kv_heads, rope_theta=1000.0)
    with torch.no_grad():
        wanted = transformers_twin(model)(ids()).logits
        got = model(ids())
    assert wanted.std() > 0.3  # the logits say something
    assert (got - wanted).abs().max() < 1e-5 * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("field", [{"norm_eps": 1e-2}, {"rope_theta": 100.0}])
def test_the_comparison_notices_a_wrong_constant(field: dict[str, float]) -> None:
    model, other = make(), make(**field)
    assert (model(ids()) - other(ids())).abs().max() > 1e-3


@pytest.mark.parametrize(("head_dim", "theta"), [(8, 10000.0), (64, 500000.0)])
def test_rotary_positions_are_transformers(head_dim: int, theta: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    context = 300
    config = LlamaConfig(hidden_size=head_dim * 2, num_attention_heads=2, max_position_embeddings=context,
                         rope_parameters={"rope_type": "default", "rope_theta": theta})  # fmt: skip
    q, k = torch.randn(2, 3, context, head_dim), torch.randn(2, 3, context, head_dim)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(context)[None])
    ours = rotary_table(head_dim, context, theta)
    assert torch.equal(ours[0], cos[0])
    assert torch.equal(ours[1], sin[0])
    ours = ours[0], negate_first_half(ours[1])
    for mine, theirs in zip((rotate(q, *ours), rotate(k, *ours)), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    assert rotate(q.bfloat16(), *ours).dtype is torch.bfloat16


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    cos, sin = rotary_table(16, 50, 1000.0)
    sin = negate_first_half(sin)
    q, k = torch.randn(16), torch.randn(16)
    turned_q = rotate(q.expand(1, 1, 50, 16), cos, sin)[0, 0]
    turned_k = rotate(k.expand(1, 1, 50, 16), cos, sin)[0, 0]
    assert torch.allclose(turned_q.norm(dim=-1), q.norm().expand(50), rtol=1e-5)
    assert torch.equal(turned_q[0], q)
    assert torch.allclose(
        (turned_q[10:] * turned_k[:-10]).sum(-1), (turned_q[10] * turned_k[0]).sum().expand(40), atol=1e-4
    )


# --- attention ---


@pytest.mark.parametrize("spec", [DENSE, TERNARY])
def test_the_future_does_not_change_the_past(spec: QuantSpec) -> None:
    model, tokens = make(spec), ids()
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 7) % BASE.vocab
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 0.1


def test_every_past_token_counts() -> None:
    model, tokens = make(), ids(1, 10)
    with torch.no_grad():
        last = model(tokens)[0, -1]
        for i in range(10):
            changed = tokens.clone()
            changed[0, i] = (changed[0, i] + 1) % BASE.vocab
            assert (model(changed)[0, -1] - last).abs().max() > 1e-4, i


def test_sequences_of_a_batch_are_independent() -> None:
    model, tokens = make(TERNARY), ids(3)
    with torch.no_grad():
        together = model(tokens)
        for i in range(3):
            assert torch.allclose(model(tokens[i : i + 1])[0], together[i], atol=1e-5)


DOCUMENTS = torch.tensor([[0] * 6 + [1] * 9 + [2] * 5, [1] * 20])


@pytest.mark.parametrize("spec", [DENSE, TERNARY])
def test_another_documents_text_changes_nothing(spec: QuantSpec) -> None:
    model, tokens = make(spec), ids()
    changed = tokens.clone()
    changed[0, :6] = (changed[0, :6] + 3) % BASE.vocab
    with torch.no_grad():
        before, after = model(tokens, DOCUMENTS), model(changed, DOCUMENTS)
    assert torch.allclose(before[0, 6:], after[0, 6:], atol=1e-6)
    assert (before[0, :6] - after[0, :6]).abs().max() > 0.1
    assert (model(tokens)[0, 6:] - before[0, 6:]).abs().max() > 1e-3  # without the mask it would


def test_packed_documents_read_as_they_do_alone() -> None:
    model, tokens = make(), ids()
    with torch.no_grad():
        packed = model(tokens, DOCUMENTS)
        for start, stop in ((0, 6), (6, 15), (15, 20)):
            alone = model(tokens[:1, start:stop])[0]
            assert torch.allclose(packed[0, start:stop], alone, atol=1e-4)
        assert torch.allclose(packed[1], model(tokens[1:])[0], atol=1e-5)


def test_gradients_stay_inside_documents() -> None:
    model = make()
    embedded: list[Tensor] = []
    model.embed_tokens.register_forward_hook(lambda *args: embedded.append(args[2].requires_grad_()) or args[2])
    model(ids(), DOCUMENTS)[0, 15:].sum().backward(inputs=embedded)
    assert embedded[0].grad is not None
    assert not bool(embedded[0].grad[0, :15].any())
    assert bool(embedded[0].grad[0, 15:].any(-1).all())


# --- the KV cache ---


def greedy(model: Decoder, prompt: Tensor, new: int, cached: bool) -> Tensor:
    cache = model.new_cache(prompt.shape[0], prompt.shape[1] + new) if cached else None
    tokens, step = prompt, prompt
    with torch.no_grad():
        for _ in range(new):
            chosen = model(step if cached else tokens, cache=cache)[:, -1].argmax(-1, keepdim=True)
            tokens, step = torch.cat((tokens, chosen), 1), chosen
    return tokens


@pytest.mark.parametrize("spec", [DENSE, TERNARY])
@pytest.mark.parametrize("norms", list(Norms))
def test_generation_with_and_without_cache_is_the_same(spec: QuantSpec, norms: Norms) -> None:
    model = make(spec, norms=norms)
    for length in (1, 2, 9):
        prompt = ids(3, length, seed=length)
        with_cache = greedy(model, prompt, 12, cached=True)
        assert torch.equal(with_cache, greedy(model, prompt, 12, cached=False))
        assert len(set(with_cache[:, length:].flatten().tolist())) > 2  # it does not just repeat one token


@pytest.mark.parametrize("chunks", [[20], [1] * 20, [5, 15], [1, 19], [7, 1, 1, 6, 5], [19, 1]])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_any_chunking_gives_the_same_logits(chunks: list[int], kv_heads: int) -> None:
    model, tokens = make(kv_heads=kv_heads), ids()
    cache = model.new_cache(2, 20)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
        assert cache.length == 20
        assert torch.allclose(torch.cat(parts, 1), model(tokens), atol=1e-5)


def test_a_full_cache_is_an_error_not_a_lost_token() -> None:
    model, tokens = make(), ids()
    for last in (1, 2):
        cache = model.new_cache(2, 4)
        with torch.no_grad():
            model(tokens[:, :4], cache=cache)
            with pytest.raises(ValueError, match="4 tokens"):
                model(tokens[:, 4 : 4 + last], cache=cache)


def test_too_many_tokens_are_refused() -> None:
    model = make()
    assert model(ids(1, 24)).shape == (1, 24, BASE.vocab)
    with pytest.raises(ValueError, match=r"25 tokens exceed model\.context=24"):
        model(ids(1, 25))
    cache = model.new_cache(1, 24)
    model(ids(1, 20), cache=cache)
    with pytest.raises(ValueError, match="25 tokens exceed"):
        model(ids(1, 5), cache=cache)
    with pytest.raises(ValueError, match="longer than the model's context"):
        KVCache(BASE, 1, 25, torch.device("cpu"), torch.float32)


def test_documents_and_a_cache_do_not_mix() -> None:
    model = make()
    with pytest.raises(ValueError, match="cannot be combined"):
        model(ids(), DOCUMENTS, model.new_cache(2, 20))


# --- types ---


@pytest.mark.parametrize("residual", [ResidualDtype.float32, ResidualDtype.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("spec", [DENSE, TERNARY])
def test_the_residual_stream_has_the_stated_type(residual: ResidualDtype, autocast: bool, spec: QuantSpec) -> None:
    model, exact = make(spec, residual_dtype=residual), make(spec)
    seen = []
    for block in model.layers:
        block.register_forward_hook(lambda *args: seen.append((args[1][0].dtype, args[2][0].dtype)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(ids())
    wanted = getattr(torch, residual.value)
    assert seen == [(wanted, wanted)] * 3
    assert logits.dtype is (torch.bfloat16 if autocast else torch.float32)
    assert (logits.float() - exact(ids())).abs().mean() < 0.1 * logits.float().std()
    logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters())


@pytest.mark.parametrize("spec", [DENSE, TERNARY, QuantSpec(LayerQuant(), (("layers.1.*", FLOAT),))])
def test_a_model_converted_to_bf16_runs(spec: QuantSpec) -> None:
    model = make(spec)
    wanted = model(ids())
    logits = model.to(torch.bfloat16)(ids())
    assert logits.dtype is torch.bfloat16
    assert (logits.float() - wanted).abs().mean() < 0.1 * wanted.std()


def test_float16_with_squared_relu_is_refused() -> None:
    with pytest.raises(ConfigError, match="overflows"):
        make(residual_dtype=ResidualDtype.float16)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="overflows float16"):
        make()(ids())
    check_decoder(dataclasses.replace(BASE, residual_dtype=ResidualDtype.float16, activation=Activation.silu))
    with torch.autocast("cpu", torch.float16):
        assert bool(torch.isfinite(make(activation=Activation.silu)(ids())).all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 7}, r"model\.heads=7 does not divide model\.hidden=32"),
        ({"heads": 4, "kv_heads": 3}, r"model\.kv_heads=3 does not divide"),
        ({"heads": 32, "kv_heads": 32}, "is odd"),
        ({"layers": 0}, r"model\.layers is 0"),
        ({"ffn": -1}, r"model\.ffn is -1"),
        ({"norm_eps": 0.0}, "positive"),
        ({"rope_theta": 0.0}, "positive"),
    ],
)
def test_impossible_shapes_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**fields)


def test_overrides_that_fit_no_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'layers\.3\.\*' matches no linear layer"):
        make(QuantSpec(overrides=(("layers.3.*", FLOAT),)))
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.k_proj.*groups=32 does not divide the 16"):
        make(QuantSpec(LayerQuant(groups=32)))


def test_a_training_step_lowers_the_loss() -> None:
    model = make(TERNARY, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = ids()
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
