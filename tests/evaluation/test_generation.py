"""Text generation: where it ends, what it may choose, and that its pieces are the whole text."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

import bitnet_train.evaluation.generate as generate_module
from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.evaluation.generate import generate_ids, generate_text
from bitnet_train.evaluation.sampling import Sampling, choose_tokens
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import FLOAT, QuantSpec

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DecoderConfig(hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, context=32, vocab=400)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return build_decoder(CONFIG, QuantSpec(FLOAT), NormalInit(std=0.2), 0).eval()


def run(model: Decoder, prompt: list[int], count: int, **fields: object) -> list[int]:
    chosen = {name: fields.pop(name) for name in ("temperature", "top_k") if name in fields}
    sampling = Sampling(**chosen)  # type: ignore[arg-type]
    return list(generate_ids(model, prompt, count, sampling=sampling, **fields))  # type: ignore[arg-type]


def test_greedy_tokens_are_the_most_likely_one_by_one(model: Decoder) -> None:
    ids = [3, 1, 4]
    for token in run(model, [3, 1, 4], 12):
        with torch.no_grad():
            assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
    assert len(ids) == 15


def test_it_ends_at_the_end_token_without_yielding_it(model: Decoder) -> None:
    tokens = run(model, [3, 1, 4], 12)
    end = next(i for i, t in enumerate(tokens) if t not in tokens[:i] and i > 2)
    assert run(model, [3, 1, 4], 12, eos_id=tokens[end]) == tokens[:end]


@pytest.mark.parametrize("length", [1, 2, 20, 31])
def test_it_ends_at_the_context(model: Decoder, length: int) -> None:
    assert len(run(model, [5] * length, 100)) == CONFIG.context - length
    assert len(run(model, [5] * length, 1)) == 1
    assert run(model, [5] * length, 0) == []


def test_a_long_prompt_keeps_its_end(model: Decoder) -> None:
    prompt = list(range(100))
    assert run(model, prompt, 5) == run(model, prompt[-31:], 5)
    assert len(run(model, prompt, 5)) == 1


def test_an_empty_prompt_is_refused(model: Decoder) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        run(model, [], 5)


def test_temperature_zero_ignores_the_seed_and_sampling_follows_it(model: Decoder) -> None:
    assert run(model, [3], 20, seed=1) == run(model, [3], 20, seed=2)
    samples = [run(model, [3], 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    assert run(model, [3], 20, temperature=1.0, top_k=1, seed=9) == run(model, [3], 20)


def test_sampling_leaves_other_random_numbers_alone(model: Decoder) -> None:
    torch.manual_seed(4)
    wanted = torch.rand(2)
    torch.manual_seed(4)
    run(model, [3], 10, temperature=1.0)
    assert torch.equal(torch.rand(2), wanted)


LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.5, 0.0])


def frequencies(temperature: float, top_k: int | None, count: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    draws = [choose_tokens(LOGITS[None], Sampling(temperature, top_k), [generator])[0] for _ in range(count)]
    return torch.bincount(torch.tensor(draws), minlength=5) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_softmax_at_the_temperature(temperature: float) -> None:
    assert torch.allclose(frequencies(temperature, None), torch.softmax(LOGITS / temperature, 0), atol=0.03)


def test_top_k_keeps_the_k_most_likely_and_their_proportions() -> None:
    got = frequencies(1.0, 2)
    assert got[[0, 2, 4]].tolist() == [0, 0, 0]
    assert torch.allclose(got[[1, 3]], torch.softmax(LOGITS[[1, 3]], 0), atol=0.03)
    assert torch.allclose(frequencies(1.0, 99), torch.softmax(LOGITS, 0), atol=0.03)
    with pytest.raises(ValueError, match="top_k is 0"):
        Sampling(1.0, 0)


def test_bf16_logits_are_sampled_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    assert choose_tokens(LOGITS.bfloat16()[None], Sampling(), [generator]) == [1]
    assert choose_tokens(LOGITS.bfloat16()[None], Sampling(0.01), [generator]) == [1]


@given(st.lists(st.integers(0, 399), max_size=30))
def test_pieces_join_to_the_whole_text_and_are_whole_characters(bpe: TextTokenizer, ids: list[int]) -> None:
    def fake(*_: object, **__: object) -> Iterator[int]:
        return iter(ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_module, "generate_ids", fake)
        pieces = list(generate_text(None, bpe, "x", 99))  # type: ignore[arg-type]
    assert "".join(pieces) == bpe.decode(ids)
    assert all(pieces)
    assert not any(piece.endswith("�") for piece in pieces[:-1])


@given(st.text(st.sampled_from("aé你😀 \n�"), max_size=12))
def test_characters_of_several_bytes_stream_whole(bpe: TextTokenizer, text: str) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    ids = [bpe.tokenizer.token_to_id(character) for piece, _ in byte_level for character in piece]  # one id per byte
    assert len(ids) == len(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_module, "generate_ids", lambda *_, **__: iter(ids))
        pieces = list(generate_text(None, bpe, "x", 99))  # type: ignore[arg-type]
    assert "".join(pieces) == text
    if "�" not in text:
        assert pieces == list(text)


def test_text_starts_after_the_prompt_and_stops_at_the_end_token(bpe: TextTokenizer, model: Decoder) -> None:
    prompt = "def f("
    ids = run(model, [bpe.bos_id, *bpe.encode(prompt)], 10, eos_id=bpe.eos_id)
    assert "".join(generate_text(model, bpe, prompt, 10)) == bpe.decode(ids)
    sampled = "".join(generate_text(model, bpe, prompt, 10, sampling=Sampling(1.0, 5), seed=3))
    assert sampled == "".join(generate_text(model, bpe, prompt, 10, sampling=Sampling(1.0, 5), seed=3))


def test_generation_is_lazy(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = model.hidden_states, []
    monkeypatch.setattr(model, "hidden_states", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    list(itertools.islice(generate_ids(model, [3], 20), 2))
    assert len(calls) == 2
