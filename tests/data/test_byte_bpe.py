"""The byte-level tokenizer: nothing is lost, every byte is counted, bad sources are refused."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from bitnet_train.data.config import BpeTokenizer, PretrainedTokenizer, TokenizerConfig
from bitnet_train.data.tokenizer import TextTokenizer, build_tokenizer, load_pretrained, load_tokenizer, train_bpe
from bitnet_train.errors import ConfigError

END = "<|endoftext|>"
any_text = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)


@given(any_text)
def test_any_text_comes_back_and_its_bytes_are_counted(bpe: TextTokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert int(bpe.byte_lengths()[ids].sum()) == len(text.encode())
    assert bpe.encode_batch([text, text]) == [ids, ids]


@given(st.lists(st.sampled_from([END, "a", " ", "<|", "|>", "é", "\n"]), max_size=12).map("".join))
def test_a_special_tokens_name_in_a_text_is_text(bpe: TextTokenizer, text: str) -> None:
    for ids in (bpe.encode(text), bpe.encode_batch([text])[0]):
        assert bpe.eos_id not in ids
        assert bpe.decode(ids) == text
        assert int(bpe.byte_lengths()[ids].sum()) == len(text.encode())


def test_every_byte_has_an_id_so_any_bytes_can_be_written(bpe: TextTokenizer) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert len(alphabet) == 256
    assert all(bpe.tokenizer.token_to_id(character) is not None for character in alphabet)
    assert bpe.byte_lengths().min() == 0
    assert (bpe.byte_lengths() == 0).sum() == 1  # the end-of-text token alone stands for no byte


def test_the_vocabulary_has_the_asked_size_and_one_special_token(bpe: TextTokenizer) -> None:
    assert bpe.vocab_size == 400
    assert bpe.bos_id == bpe.eos_id == bpe.tokenizer.token_to_id(END)
    assert bpe.decode([bpe.bos_id, *bpe.encode("ab"), bpe.eos_id]) == "ab"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("def it's  fine\n\n  x1 = 'y'", ["def", " it", "'s", " ", " fine", "\n\n ", " x", "1", " =", " '", "y", "'"]),
        ("abc123def", ["abc", "123", "def"]),
        ("a_b(c)[0]", ["a", "_", "b", "(", "c", ")[", "0", "]"]),
        ("tail  ", ["tail", "  "]),
    ],
)
def test_text_is_split_by_gpt2s_expression(bpe: TextTokenizer, text: str, pieces: list[str]) -> None:
    split = [text[start:end] for _, (start, end) in bpe.tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert split == pieces
    assert "".join(pieces) == text
    # GPT-2's expression for ASCII text
    assert re.findall(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", text) == pieces


def test_no_token_crosses_a_split(bpe: TextTokenizer) -> None:
    pretokens = bpe.tokenizer.pre_tokenizer
    for token in bpe.tokenizer.get_vocab():
        if token != END:
            text = bpe.tokenizer.decoder.decode([token])
            if "�" not in text:
                assert len(pretokens.pre_tokenize_str(text)) == 1, token


def test_training_depends_on_text_and_settings_only(texts: list[str]) -> None:
    first, second = (train_bpe(texts, BpeTokenizer(vocab_size=330)) for _ in range(2))
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    assert train_bpe(texts[:30], BpeTokenizer(vocab_size=330)).tokenizer.to_str() != first.tokenizer.to_str()


def test_training_learns_merges(bpe: TextTokenizer, texts: list[str]) -> None:
    assert len(bpe.encode(texts[0])) < 0.5 * len(texts[0].encode())


def test_another_end_of_text_token(texts: list[str]) -> None:
    tokenizer = train_bpe(texts, BpeTokenizer(vocab_size=300, end_of_text="<eot>"))
    assert tokenizer.eos_id == tokenizer.tokenizer.token_to_id("<eot>")
    assert tokenizer.tokenizer.token_to_id(END) is None


def test_saving_and_loading_gives_the_same_ids(bpe: TextTokenizer, tmp_path: Path, texts: list[str]) -> None:
    bpe.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    text = texts[3] + END
    assert (loaded.bos_id, loaded.eos_id) == (bpe.bos_id, bpe.eos_id)
    assert loaded.encode(text) == bpe.encode(text)
    assert loaded.byte_lengths().tolist() == bpe.byte_lengths().tolist()


@pytest.mark.parametrize("broken", ["tokenizer.json", "special_tokens.json"])
def test_a_damaged_saved_tokenizer_is_refused(bpe: TextTokenizer, tmp_path: Path, broken: str) -> None:
    bpe.save(tmp_path)
    (tmp_path / broken).write_text("{")
    with pytest.raises(ConfigError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / broken).unlink()
    with pytest.raises(ConfigError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)


# --- existing tokenizers ---


def pretrained(source: Path | str, size: int = 400, **fields: str | None) -> PretrainedTokenizer:
    return PretrainedTokenizer(source=str(source), vocab_size=size, **{"bos": END, "eos": END, **fields})


def test_a_local_file_or_folder_is_taken(bpe: TextTokenizer, tmp_path: Path, texts: list[str]) -> None:
    bpe.save(tmp_path)
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = build_tokenizer(pretrained(source), iter(()))
        assert loaded.encode(texts[0]) == bpe.encode(texts[0])
        assert (loaded.bos_id, loaded.eos_id) == (bpe.bos_id, bpe.eos_id)
    assert load_pretrained(pretrained(tmp_path, size=1000)).vocab_size == 400


OWN = {"bos": None, "eos": None}


def test_the_tokenizer_of_a_run_comes_with_its_special_tokens_and_template(bpe: TextTokenizer, tmp_path: Path) -> None:
    replace(bpe, eos_id=7, chat_template="{{ messages }}").save(tmp_path / "run" / "tokenizer")
    for source in ("run", "run@500", "run/tokenizer", "run/tokenizer/tokenizer.json"):
        loaded = load_pretrained(pretrained(tmp_path / source, **OWN))
        assert (loaded.bos_id, loaded.eos_id, loaded.chat_template) == (bpe.bos_id, 7, "{{ messages }}")
    assert load_pretrained(pretrained(tmp_path / "run")).eos_id == bpe.eos_id  # what is given is taken


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"config.json": {"bos_token_id": 5, "eos_token_id": [6, 7]}, "tokenizer_config.json": {"bos_token": END}},
            (5, 6),
        ),
        ({"config.json": {"bos_token_id": 0, "eos_token_id": 3}}, (0, 3)),
        ({"config.json": {"bos_token_id": None}, "tokenizer_config.json": {"eos_token": {"content": END}}}, None),
        ({"tokenizer_config.json": {"bos_token": None, "eos_token": END}}, None),
    ],
)
def test_special_tokens_are_those_of_the_model(
    bpe: TextTokenizer, tmp_path: Path, files: dict[str, Any], expected: tuple[int, int] | None
) -> None:
    bpe.tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    loaded = load_pretrained(pretrained(tmp_path, **OWN))
    assert (loaded.bos_id, loaded.eos_id) == (expected or (bpe.eos_id, bpe.eos_id))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"bos_token_id": true}', '{"eos_token_id": []}'])
def test_special_tokens_that_nothing_names_are_asked_for(
    bpe: TextTokenizer, tmp_path: Path, content: str | None
) -> None:
    bpe.tokenizer.save(str(tmp_path / "tokenizer.json"))
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.eos is not set, and no file .* says which"):
        load_pretrained(pretrained(tmp_path, **OWN))
    (tmp_path / "config.json").write_text('{"bos_token_id": 4000, "eos_token_id": 1}')
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.bos=4000 is not in the vocabulary"):
        load_pretrained(pretrained(tmp_path, **OWN))


def test_the_token_that_ends_a_document_starts_one_where_nothing_else_does(bpe: TextTokenizer, tmp_path: Path) -> None:
    bpe.tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_pretrained(pretrained(tmp_path, bos=None))
    assert (loaded.bos_id, loaded.eos_id) == (bpe.eos_id, bpe.eos_id)
    (tmp_path / "config.json").write_text('{"bos_token_id": 5, "eos_token_id": 6}')
    loaded = load_pretrained(pretrained(tmp_path, bos=None))
    assert (loaded.bos_id, loaded.eos_id) == (5, bpe.eos_id)


def test_a_tokenizer_in_the_hubs_cache_comes_with_what_lies_beside_it(bpe: TextTokenizer, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--somebody--model"
    snapshot = repository / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    for name in ("main", "v2"):
        (repository / "refs" / name).write_text(snapshot.name)
    bpe.tokenizer.save(str(snapshot / "tokenizer.json"))
    (snapshot / "config.json").write_text('{"bos_token_id": 5, "eos_token_id": [6, 7]}')
    (snapshot / "chat_template.jinja").write_text("{{ messages }}")
    code = (
        "from bitnet_train.data.config import PretrainedTokenizer\n"
        "from bitnet_train.data.tokenizer import load_pretrained\n"
        "for source, given in (('somebody/model', None), ('somebody/model@v2', '<|endoftext|>')):\n"
        "    cfg = PretrainedTokenizer(source=source, vocab_size=400, bos=given, eos=given)\n"
        "    found = load_pretrained(cfg)\n"
        "    print(found.bos_id, found.eos_id, found.chat_template)\n"
    )
    offline = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["5 6 {{ messages }}", f"{bpe.eos_id} {bpe.eos_id} {{{{ messages }}}}"], done


def test_a_pretrained_tokenizer_that_does_not_fit_is_refused(bpe: TextTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    with pytest.raises(ConfigError, match=r"400 ids but data\.tokenizer\.vocab_size=399"):
        load_pretrained(pretrained(tmp_path, size=399))
    for key in ("bos", "eos"):
        with pytest.raises(ConfigError, match=rf"data\.tokenizer\.{key}=<s> is not in the vocabulary"):
            load_pretrained(pretrained(tmp_path, **{key: "<s>"}))


def test_ids_beyond_the_count_still_need_rows(bpe: TextTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    last = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][last] = 450  # a hole: 400 entries, highest id 450
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="451 ids"):
        load_pretrained(pretrained(tmp_path))
    holed = load_pretrained(pretrained(tmp_path, size=451))
    assert holed.vocab_size == len(holed.byte_lengths()) == 451


def test_unreadable_sources_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "tokenizer.json", tmp_path / "empty"):
        with pytest.raises(ConfigError, match=r"data\.tokenizer\.source=.*neither a tokenizer\.json") as caught:
            load_pretrained(pretrained(source))
        assert "\n" not in str(caught.value)


def test_tokenizers_that_lose_bytes_are_refused(tmp_path: Path, texts: list[str]) -> None:
    words = Tokenizer(models.WordLevel({END: 0, "[UNK]": 1, "Def": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    metaspace = Tokenizer.from_str(train_bpe(texts, BpeTokenizer(vocab_size=300)).tokenizer.to_str())
    metaspace.pre_tokenizer, metaspace.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    lower = Tokenizer.from_str(train_bpe(texts, BpeTokenizer(vocab_size=300)).tokenizer.to_str())
    lower.normalizer = normalizers.Lowercase()
    for i, tokenizer in enumerate((words, metaspace, lower)):
        path = tmp_path / f"{i}.json"
        tokenizer.save(str(path))
        with pytest.raises(ConfigError, match="no byte-level BPE"):
            load_pretrained(pretrained(path))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer=other"):
        build_tokenizer(TokenizerConfig(name="other", vocab_size=300), iter(()))
