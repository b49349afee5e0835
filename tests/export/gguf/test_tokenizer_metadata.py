"""The tokenizer as ``tokenizer.ggml.*`` keys, and made of them again."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from bitnet_train.data.config import BpeTokenizer
from bitnet_train.data.tokenizer import TextTokenizer, train_bpe
from bitnet_train.errors import ConfigError
from bitnet_train.export.gguf.tokenizer_metadata import (
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNUSED,
    USER_DEFINED,
    pre_tokenizer_name,
    tokenizer_from_metadata,
    tokenizer_metadata,
    tokenizer_obstacle,
)
from tests.conftest import make_text

ODD_TEXTS = [
    "", " ", "  leading", "trailing \n\n", "a\r\nb", "né 你好 \U0001f600", "x , y . don't I'LL we'Ve", "  \t \n  x",
    "0123456789 1 22 333 4444 55555", "<|endoftext|>", "a<|endoftext|>b <|endoftext|>\n", "\u00a0\u2003x\u200b", "é",
    "١٢٣ ½ Ⅷ", "\x00\x01\x7f", "x" * 200, " " * 100 + "y", "\n" * 20, make_text(300), "[PAD401]", "f(x):\n    return",
]  # fmt: skip
VOCAB = 416


def split_by(name: str, tokenizer: TextTokenizer) -> TextTokenizer:
    """The same vocabulary behind another pre-tokenizer of llama.cpp's list."""
    copy = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    regex = PRE_TOKENIZERS[name]
    if regex is not None:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        copy.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), byte_level])
    return TextTokenizer(copy, tokenizer.bos_id, tokenizer.eos_id)


def there_and_back(tokenizer: TextTokenizer) -> TextTokenizer:
    return tokenizer_from_metadata(tokenizer_metadata(tokenizer, VOCAB))


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_ids_of_odd_texts_come_back(name: str, bpe: TextTokenizer) -> None:
    ours = split_by(name, bpe)
    theirs = there_and_back(ours)
    assert tokenizer_metadata(ours, VOCAB)["tokenizer.ggml.pre"] == name
    for text in ODD_TEXTS:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert (theirs.bos_id, theirs.eos_id) == (bpe.bos_id, bpe.eos_id)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@given(text=st.text(max_size=60))
def test_ids_of_any_text_come_back(name: str, text: str, bpe: TextTokenizer) -> None:
    ours = split_by(name, bpe)
    assert there_and_back(ours).encode(text) == ours.encode(text)


def test_the_pre_tokenizers_split_differently(bpe: TextTokenizer) -> None:
    text = "0123456789 don't  x"
    split = {
        name: tuple(piece for piece, _ in split_by(name, bpe).tokenizer.pre_tokenizer.pre_tokenize_str(text))
        for name in PRE_TOKENIZERS
    }
    assert len(set(split.values())) == len(PRE_TOKENIZERS)


def test_tokens_have_the_types_of_llama_cpp(bpe: TextTokenizer) -> None:
    tokenizer = TextTokenizer(Tokenizer.from_str(bpe.tokenizer.to_str()), bpe.bos_id, bpe.eos_id)
    tokenizer.tokenizer.add_tokens([AddedToken("<note>", special=False, normalized=False)])
    note = tokenizer.tokenizer.token_to_id("<note>")
    metadata = tokenizer_metadata(tokenizer, VOCAB)
    types = metadata["tokenizer.ggml.token_type"]
    assert types[bpe.bos_id] == CONTROL
    assert types[note] == USER_DEFINED
    assert set(types[note + 1 :]) == {UNUSED}
    assert {kind for i, kind in enumerate(types[:note]) if i != bpe.bos_id} == {NORMAL}
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == len(tokens) == len(types) == len(metadata["tokenizer.ggml.scores"]) == VOCAB
    again = tokenizer_from_metadata(metadata)
    assert again.encode("a<note>b") == tokenizer.encode("a<note>b")
    assert note in again.encode("a<note>b")
    assert again.vocab_size == tokenizer.vocab_size


def with_prefix_space(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def with_another_regex(tokenizer: Tokenizer) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])


def with_digits_apart(tokenizer: Tokenizer) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level])


def with_a_normalizer(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()


def without_regex(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def without_pre_tokenizer(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "change",
    [
        with_prefix_space,
        with_another_regex,
        with_digits_apart,
        with_a_normalizer,
        without_regex,
        without_pre_tokenizer,
    ],
)
def test_text_that_llama_cpp_would_split_otherwise_is_refused(
    change: Callable[[Tokenizer], None], bpe: TextTokenizer
) -> None:
    tokenizer = Tokenizer.from_str(bpe.tokenizer.to_str())
    change(tokenizer)
    with pytest.raises(ConfigError, match=r"splits text like none of gpt-2, llama-bpe, qwen2: export to hf-\* or pa"):
        pre_tokenizer_name(tokenizer)


def test_another_kind_of_tokenizer_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.decoder = decoders.ByteLevel()
    with pytest.raises(ConfigError, match="needs a byte-level BPE tokenizer, not WordLevel"):
        tokenizer_metadata(TextTokenizer(words, 0, 0), 2)


def test_a_tokenizer_without_merges_is_refused() -> None:
    single_bytes = train_bpe(["a"], BpeTokenizer(vocab_size=257))
    assert not json.loads(single_bytes.tokenizer.to_str())["model"]["merges"]
    with pytest.raises(ConfigError, match="has no merges"):
        tokenizer_metadata(single_bytes, 257)


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer.ggml.model": "llama"},
        {"tokenizer.ggml.pre": "deepseek"},
        {"tokenizer.ggml.pre": ["gpt-2"]},
        {"tokenizer.ggml.tokens": 3},
        {"tokenizer.ggml.tokens": ["a"] * VOCAB},
        {"tokenizer.ggml.tokens": list(range(VOCAB))},
        {"tokenizer.ggml.token_type": [NORMAL]},
        {"tokenizer.ggml.merges": ["a"]},
        {"tokenizer.ggml.merges": ["a b c"]},
        {"tokenizer.ggml.merges": ["line\nend x"]},
        {"tokenizer.ggml.merges": [3]},
        {"tokenizer.ggml.bos_token_id": "one"},
        {"tokenizer.ggml.bos_token_id": VOCAB},
        {"tokenizer.ggml.eos_token_id": -1},
    ],
)
def test_keys_that_contradict_each_other_are_one_sentence(change: dict[str, Any], bpe: TextTokenizer) -> None:
    with pytest.raises(ConfigError, match="tokenizer is damaged or of a kind that is not read here") as caught:
        tokenizer_from_metadata(tokenizer_metadata(bpe, VOCAB) | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"])
def test_missing_keys_are_one_sentence(key: str, bpe: TextTokenizer) -> None:
    metadata = tokenizer_metadata(bpe, VOCAB)
    del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(ConfigError, match="tokenizer is damaged"):
        tokenizer_from_metadata(metadata)


def test_a_tokenizer_without_a_gguf_form_is_named_before_anything_is_written(bpe: TextTokenizer) -> None:
    assert tokenizer_obstacle(bpe, 416) is None
    other = Tokenizer.from_str(bpe.tokenizer.to_str())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    obstacle = tokenizer_obstacle(replace(bpe, tokenizer=other), 416)
    assert obstacle is not None
    assert "splits text like none of gpt-2" in obstacle
