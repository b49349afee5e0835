"""Many prompts at once: each comes out as alone; filters of the distribution; stop strings."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.evaluation.generate import generate_ids, generate_steps, generate_text, generate_texts
from bitnet_train.evaluation.sampling import Sampling, probabilities
from bitnet_train.evaluation.text_stream import TextStream
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import FLOAT, QuantSpec

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DecoderConfig(hidden=32, layers=2, heads=4, kv_heads=2, ffn=48, context=32, vocab=400)
PROMPTS = [[3, 1, 4], [5], [9, 2, 6, 5, 3, 5, 8], [3, 1, 4]]


@pytest.fixture(scope="module", params=[QuantSpec(FLOAT), QuantSpec()], ids=["float", "ternary"])
def model(request: pytest.FixtureRequest) -> Decoder:
    return build_decoder(CONFIG, request.param, NormalInit(std=0.2), 0).eval()


def together(model: Decoder, prompts: list[list[int]], count: int, **fields: object) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in generate_steps(model, prompts, count, **fields):  # type: ignore[arg-type]
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, 20, 0.9, 0.05)])
def test_a_batch_gives_what_each_prompt_gives_alone(model: Decoder, sampling: Sampling) -> None:
    rows = together(model, PROMPTS, 12, sampling=sampling, seeds=[7, 8, 9, 10])
    for i, prompt in enumerate(PROMPTS):
        assert rows[i] == list(generate_ids(model, prompt, 12, sampling=sampling, seed=7 + i))


def test_padding_is_never_looked_at(model: Decoder) -> None:
    cache = model.new_cache(2, 16, torch.tensor([0, 5]))
    ids = torch.randint(0, 400, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids, cache=cache)
        other = ids.clone()
        other[1, :5] = 7
        assert torch.equal(model(other, cache=model.new_cache(2, 16, torch.tensor([0, 5])))[1, 5:], logits[1, 5:])
        assert torch.allclose(logits[1, 5:], model(ids[1:, 5:])[0], atol=1e-4)
        assert torch.allclose(logits[0], model(ids[:1])[0], atol=1e-4)
        after = model(ids[:, :2], cache=cache)
        alone = model(torch.cat((ids[1:, 5:], ids[1:, :2]), dim=1))
    assert torch.allclose(after[1], alone[0, -2:], atol=1e-4)


def test_sequences_end_one_by_one(model: Decoder) -> None:
    free = together(model, PROMPTS, 12)
    end = free[1][3]
    rows = together(model, PROMPTS, 12, eos_id=end)
    for row, whole in zip(rows, free, strict=True):
        assert row == (whole[: whole.index(end)] if end in whole else whole)


def test_the_longest_prompt_and_the_context_limit_all(model: Decoder) -> None:
    rows = together(model, [[1] * 30, [2]], 100)
    assert [len(row) for row in rows] == [2, 2]
    assert together(model, [[1] * 100, [2]], 100)[0] == together(model, [[1] * 31], 100)[0]
    with pytest.raises(ValueError, match="at least one token"):
        together(model, [[1], []], 5)
    with pytest.raises(ValueError, match="at least one token"):
        together(model, [], 5)


LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.5, 0.0])
SOFTMAX = torch.softmax(LOGITS, 0)  # about 0.077 0.568 0.004 0.344 0.028


def kept(sampling: Sampling) -> list[int]:
    chances = probabilities(LOGITS, sampling)
    assert float(chances.sum()) == pytest.approx(1)
    indices = chances.nonzero().flatten().tolist()
    assert torch.allclose(chances[indices], torch.softmax(LOGITS[indices] / sampling.temperature, 0))
    return indices  # type: ignore[no-any-return]


def test_filters_keep_what_they_say_in_its_proportions() -> None:
    assert kept(Sampling(1.0)) == [0, 1, 2, 3, 4]
    assert kept(Sampling(1.0, top_p=0.5)) == [1]
    assert kept(Sampling(1.0, top_p=0.6)) == [1, 3]
    assert kept(Sampling(1.0, top_p=0.95)) == [0, 1, 3]
    assert kept(Sampling(1.0, top_p=1e-9)) == [1]
    assert kept(Sampling(1.0, min_p=0.5)) == [1, 3]
    assert kept(Sampling(1.0, min_p=1.0)) == [1]
    assert kept(Sampling(3.0, min_p=0.5)) == [0, 1, 3]  # at a higher temperature more are likely
    assert kept(Sampling(1.0, top_k=3, top_p=0.99, min_p=0.2)) == [1, 3]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Sampling(**fields)  # type: ignore[arg-type]


@given(st.text(st.sampled_from("ab\né"), max_size=40), st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3))
def test_a_stream_ends_before_the_first_stop_string(bpe: TextTokenizer, text: str, stop: list[str]) -> None:
    stream = TextStream(bpe, tuple(stop))
    pieces = [stream.add(token) for token in bpe.encode(text)]
    shown = "".join(pieces) + stream.end()
    found = [text.find(s) for s in stop if s in text]
    # A stop string ends the text where it is complete; of several that a token completes, the first one counts.
    assert text.startswith(shown)
    if not found:
        assert shown == text
        assert not stream.stopped
    else:
        assert stream.stopped
        assert not any(s in shown for s in stop)
        assert any(text[len(shown) :].startswith(s) for s in stop)


def test_nothing_of_a_stop_string_is_ever_shown(bpe: TextTokenizer) -> None:
    stream = TextStream(bpe, ("###",))
    shown = [stream.add(token) for token in bpe.encode("a#") + bpe.encode("#") + bpe.encode("b##") + bpe.encode("#c")]
    assert "".join(shown) == "a##b"
    assert stream.stopped
    assert stream.end() == ""
    with pytest.raises(ValueError, match="empty"):
        TextStream(bpe, ("",))


def test_texts_of_a_batch_are_those_of_each_prompt(bpe: TextTokenizer, model: Decoder) -> None:
    prompts = ["def f(", "x", "class A:\n    def"]
    texts = generate_texts(model, bpe, prompts, 8)
    assert texts == ["".join(generate_text(model, bpe, prompt, 8)) for prompt in prompts]
    first = next(character for character in texts[0] if character.strip())
    stopped = generate_texts(model, bpe, prompts, 8, stop=(first,))
    assert stopped == [text.split(first)[0] for text in texts]


def test_a_long_prompt_shortens_no_other_text(bpe: TextTokenizer, model: Decoder) -> None:
    prompts = ["x", "def f(a): " * 30, "y"]
    sampling = Sampling(1.0)
    texts = generate_texts(model, bpe, prompts, 8, sampling=sampling, seed=5)
    alone = [generate_texts(model, bpe, [p], 8, sampling=sampling, seed=5 + i)[0] for i, p in enumerate(prompts)]
    assert texts == alone
    assert len(bpe.encode(texts[0])) > 1
