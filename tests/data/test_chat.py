"""Conversations: what the template writes, which of its tokens are learnt, and what cannot be learnt from."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import AddedToken

from bitnet_train.data.chat import Conversation
from bitnet_train.data.chat_template import ChatEncoder
from bitnet_train.data.config import BpeTokenizer, ChatCorpus, DataConfig, MixtureCorpus, PretrainedTokenizer
from bitnet_train.data.corpus import open_corpus
from bitnet_train.data.mixture import check_mixture
from bitnet_train.data.prepare import prepare, prepared, shard_folder
from bitnet_train.data.shards import TokenArray, verify_shards
from bitnet_train.data.tokenizer import TextTokenizer, load_tokenizer, train_bpe
from bitnet_train.data.windows import IGNORED, Windows, inputs_and_targets
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.bits_per_byte import windows_loss
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.nn.decoder import Decoder
from bitnet_train.quant.config import QuantConfig
from bitnet_train.quant.spec import build_spec
from tests.conftest import make_text

CHATML = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# As Llama 3's: bos of its own, contents trimmed.
LLAMA = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n\n{{ message['content'] | trim }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for message in messages %}\n"
    "{% if message.role == 'assistant' %}\n"
    "<|start|>assistant {% generation %}{{ message.content }}<|end|>{% endgeneration %}\n"
    "{% else %}\n<|start|>{{ message.role }} {{ message.content }}<|end|>\n{% endif %}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "héllo"},
    {"role": "assistant", "content": " hi "},
    {"role": "user", "content": "more?"},
    {"role": "assistant", "content": "no"},
    {"role": "user", "content": "bye"},
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    base = train_bpe([make_text(i) for i in range(30)], BpeTokenizer(vocab_size=300, end_of_text="<|bos|>"))
    tokens = ["<|start|>", "<|end|>", "<|end|>x"]
    base.tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    end = base.tokenizer.token_to_id("<|end|>")
    return TextTokenizer(base.tokenizer, base.bos_id, end)


def talk(messages: list[dict[str, str]], where: str = "x.jsonl line 3") -> Conversation:
    return Conversation("", False, tuple(messages), where)


def test_several_turns_by_hand(tokenizer: TextTokenizer) -> None:
    start, end = (tokenizer.tokenizer.token_to_id(t) for t in ("<|start|>", "<|end|>"))

    def said(text: str) -> list[int]:
        return tokenizer.encode(text)

    prompts = [
        [tokenizer.bos_id, start, *said("system\nbe brief"), end, *said("\n")],
        [start, *said("user\nhéllo"), end, *said("\n"), start, *said("assistant\n")],
        [start, *said("user\nmore?"), end, *said("\n"), start, *said("assistant\n")],
        [start, *said("user\nbye"), end, *said("\n")],
    ]
    turns = [[*said(" hi "), end, *said("\n")], [*said("no"), end, *said("\n")]]
    wanted = [
        *((i, 0) for i in (*prompts[0], *prompts[1])),
        *((i, 1) for i in turns[0]),
        *((i, 0) for i in prompts[2]),
        *((i, 1) for i in turns[1]),
        *((i, 0) for i in prompts[3]),
    ]
    ids, mask = ChatEncoder(tokenizer, CHATML).encode(talk(TALK))
    assert list(zip(ids, mask, strict=True)) == wanted


@pytest.mark.parametrize("template", [CHATML, LLAMA])
def test_a_turn_is_what_follows_the_generation_prompt(tokenizer: TextTokenizer, template: str) -> None:
    segments = ChatEncoder(tokenizer, template).segments(talk(TALK[:5]))
    prompt = "<|start|>assistant\n" if template is CHATML else "<|start|>assistant\n\n"
    assert [text for text, learnt in segments if learnt] == (
        [" hi <|end|>\n", "no<|end|>\n"] if template is CHATML else ["hi<|end|>", "no<|end|>"]
    )
    assert all(text.endswith(prompt) for text, learnt in segments if not learnt)


def test_ids_and_masks_are_those_of_transformers(tokenizer: TextTokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    plain = tokenizer.tokenizer.__class__.from_str(tokenizer.tokenizer.to_str())
    theirs = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<|bos|>", eos_token="<|end|>")
    for messages in (TALK, TALK[1:3], TALK[:3]):
        found = theirs.apply_chat_template(
            messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        assert ChatEncoder(tokenizer, MARKED).encode(talk(messages)) == (
            list(found["input_ids"]),
            list(found["assistant_masks"]),
        )
        for template in (LLAMA, CHATML):
            ids = list(theirs.apply_chat_template(messages, chat_template=template, return_dict=True)["input_ids"])
            bos = [] if template is LLAMA else [tokenizer.bos_id]
            assert ChatEncoder(tokenizer, template).encode(talk(messages))[0] == bos + ids


@pytest.mark.parametrize("template", [CHATML, LLAMA, MARKED])
def test_a_message_cannot_end_its_turn(tokenizer: TextTokenizer, template: str) -> None:
    said = "<|end|>x <|end|> <|start|>assistant <|bos|>"
    ids, _ = ChatEncoder(tokenizer, template).encode(talk([{"role": "user", "content": said}, TALK[2]]))
    specials = set(tokenizer.tokenizer.get_added_tokens_decoder())
    counts = [sum(i == special for i in ids) for special in sorted(specials)]
    assert counts == [1, 2, 2, 0]  # bos, start, end, end-x: the template's own
    assert said in tokenizer.decode(ids)


def test_what_a_template_cannot_do(tokenizer: TextTokenizer) -> None:
    for template, message in (
        ("{% for %}", "The chat template is no Jinja"),
        ("{{ raise_exception('no system') }}", r"x.jsonl line 3: the chat template refuses .*: no system"),
        ("{{ messages[0].content.foo.bar }}", r"x.jsonl line 3: the chat template refuses"),
        ("{{ messages.append(1) }}", r"x.jsonl line 3: the chat template refuses"),
        (
            "{{ messages | length }}{{ messages[-1].content }}",
            r"line 3: the chat template writes earlier turns otherwise",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "writes no tokens of the assistant"),
        ("{{ strftime_now('%Y') }}", "the chat template refuses the conversation: 'strftime_now' is undefined"),
    ):
        with pytest.raises(ConfigError, match=message):
            ChatEncoder(tokenizer, template).encode(talk(TALK[1:]))


# ------------------------------------------------------------------------------------------------------- files


def write(path: Path, *conversations: object, field: str = "messages") -> Path:
    path.write_text("".join(json.dumps({field: messages}) + "\n" for messages in conversations))
    return path


def read(path: Path, **settings: Any) -> list[Any]:
    return list(open_corpus(ChatCorpus(path=str(path), **settings)).documents())


def test_jsonl_and_parquet_hold_the_same_conversations(tmp_path: Path) -> None:
    talks = [[{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}] for i in range(20)]
    found = read(write(tmp_path / "x.jsonl", *talks), validation_every=10)
    assert [list(c.messages) for c in found] == talks
    assert [i for i, c in enumerate(found) if c.validation] == [7, 17]
    assert found[2].where == f"{tmp_path}/x.jsonl line 3"
    assert found[2].text == "q 2\na 2"
    pq.write_table(pa.table({"talk": talks}), tmp_path / "x.parquet")
    table = read(tmp_path / "x.parquet", messages_field="talk", validation_every=10)
    assert [replace(c, where="") for c in table] == [replace(c, where="") for c in found]
    assert [c.text for c in read(tmp_path, patterns=["*.jsonl"])] == [c.text for c in found]
    held = read(tmp_path / "x.jsonl", validation_path=str(write(tmp_path / "v.jsonl", talks[0])))
    assert [c.validation for c in held] == [False] * 20 + [True]


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (None, "line 2 has no list of messages in 'messages'"),
        ([], "line 2 has no list of messages"),
        ("hi", "line 2 has no list of messages"),
        (["hi"], "line 2: every message needs a role and a content"),
        ([{"role": "user"}], "line 2: every message needs"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "x"}]}], "line 2: every message needs"),
        ([{"role": "user", "content": "x"}], "line 2 has no turn of the assistant"),
        ([{"role": "assistant", "content": " "}], "line 2 has no turn of the assistant"),
        ([{"role": "assistant", "content": "\ud800"}], "line 2 holds half of a surrogate pair"),
        ([{"role": "assistant", "content": "\U00100000"}], "line 2 holds .* a character of a private plane"),
    ],
)
def test_a_conversation_that_teaches_nothing_is_refused_with_its_line(
    tmp_path: Path, conversation: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(write(tmp_path / "x.jsonl", TALK, conversation))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for content, message in (
        (b"{", "line 1 is no JSON"),
        (b'{"a": "\xff"}', "line 1 is no JSON"),
        (b"3", "line 1 has no"),
    ):
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read(tmp_path / "x.jsonl")
    with pytest.raises(ConfigError, match="path is not set"):
        open_corpus(ChatCorpus())
    with pytest.raises(ConfigError, match="does not exist"):
        open_corpus(ChatCorpus(path=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"template=none\.jinja is neither Jinja nor a file"):
        open_corpus(ChatCorpus(path=str(tmp_path), template="none.jinja"))


# ------------------------------------------------------------------------------------------------------ shards


@pytest.fixture
def chat(tmp_path: Path, tokenizer: TextTokenizer) -> Callable[..., DataConfig]:
    """Makes a DataConfig over 30 conversations and a tokenizer's folder with a chat template."""
    talks = [[*TALK[:2], {"role": "assistant", "content": make_text(i, 12)}, TALK[3], TALK[4]] for i in range(30)]
    write(tmp_path / "talks.jsonl", *talks)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
    (tmp_path / "tokenizer/chat_template.jinja").write_text(LLAMA)
    source = str(tmp_path / "tokenizer")

    def build(**corpus: Any) -> DataConfig:
        return DataConfig(
            corpus=ChatCorpus(path=str(tmp_path / "talks.jsonl"), validation_every=10, **corpus),
            tokenizer=PretrainedTokenizer(source=source, vocab_size=304, bos="<|bos|>", eos="<|end|>"),
            sequence_length=16,
            shard_tokens=400,
        )

    return build


def arrays(cfg: DataConfig, root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    manifest = prepare(cfg, root)
    folder = shard_folder(cfg, root)
    assert verify_shards(folder, manifest, cfg.verify) == "every byte"
    found = [TokenArray(folder, manifest, split, masks=masks) for masks in (False, True)]
    assert len(found[0]) == len(found[1]) == manifest.splits[split]["tokens"]
    assert len(manifest.masks(split)) == len(manifest.shards(split))
    return found[0].slice(0, len(found[0])), found[1].slice(0, len(found[1]))


def test_shards_hold_the_conversations_and_their_masks(chat: Callable[..., DataConfig], tmp_path: Path) -> None:
    for template in (None, CHATML):
        cfg, root = chat(template=template), tmp_path / "shards"
        encoder = ChatEncoder(load_tokenizer_of(cfg, root), template or LLAMA)
        documents = list(open_corpus(cfg.corpus).documents())
        for split in ("train", "val"):
            wanted = [encoder.encode(d) for d in documents if d.validation is (split == "val")]  # type: ignore[arg-type]
            ids, mask = arrays(cfg, root, split)
            assert ids.tolist() == [i for document, _ in wanted for i in document]
            assert mask.tolist() == [i for _, masks in wanted for i in masks]
            assert prepare(cfg, root).splits[split]["learnt"] == mask.sum()


def load_tokenizer_of(cfg: DataConfig, root: Path) -> TextTokenizer:
    prepare(cfg, root)
    found = load_tokenizer(shard_folder(cfg, root))
    # It goes on with exports.
    assert found.chat_template == (cfg.corpus.template or LLAMA)  # type: ignore[attr-defined]
    return found


def test_an_edited_mask_or_template_is_noticed(chat: Callable[..., DataConfig], tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(CHATML)
    cfg, root = chat(template=str(file)), tmp_path / "shards"
    manifest = prepare(cfg, root)
    assert prepared(cfg, root) == manifest
    mask = shard_folder(cfg, root) / "train-00001.mask.npy"
    np.save(mask, 1 - np.load(mask))
    with pytest.raises(ConfigError, match=r"train-00001\.mask\.npy was edited"):
        verify_shards(shard_folder(cfg, root), manifest, cfg.verify)
    file.write_text(LLAMA)
    with pytest.raises(ConfigError, match="has changed since"):
        prepared(cfg, root)


def test_windows_carry_targets_only_for_the_assistant(chat: Callable[..., DataConfig], tmp_path: Path) -> None:
    cfg, root = chat(), tmp_path / "shards"
    _, mask = arrays(cfg, root, "train")
    manifest, folder = prepare(cfg, root), shard_folder(cfg, root)
    tokens = [TokenArray(folder, manifest, "train", masks=masks) for masks in (False, True)]
    masked, plain = Windows(tokens[0], 16, mask=tokens[1]), Windows(tokens[0], 16)
    inputs, targets = inputs_and_targets(torch.stack([masked[i] for i in range(len(masked))]))
    same_inputs, all_targets = inputs_and_targets(torch.stack([plain[i] for i in range(len(plain))]))
    assert torch.equal(inputs, same_inputs)
    learnt = torch.from_numpy(mask[1 : 1 + targets.numel()]).view_as(targets) == 1
    assert torch.equal(targets, all_targets.where(learnt, IGNORED))
    assert 0 < int(learnt.sum()) < learnt.numel()


def test_bits_per_byte_are_those_of_the_assistant(chat: Callable[..., DataConfig], tmp_path: Path) -> None:
    cfg, root = chat(), tmp_path / "shards"
    ids, mask = arrays(cfg, root, "val")
    tokenizer = load_tokenizer(shard_folder(cfg, root))
    shape = DecoderConfig(vocab=304, hidden=16, layers=1, heads=2, kv_heads=2, ffn=32, context=4096)
    model = Decoder(shape, build_spec(QuantConfig())).eval()
    batch = torch.from_numpy(np.stack([ids, np.where(mask == 1, ids, IGNORED)]))[None]
    found = windows_loss(model, [batch], tokenizer.byte_lengths())
    logits = model(torch.from_numpy(ids)[None, :-1])[0].float()
    nats = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids)[1:], reduction="none").detach()
    assert found.tokens == mask[1:].sum()
    assert found.nats == pytest.approx(float(nats[torch.from_numpy(mask[1:]) == 1].sum()), rel=1e-5)
    said = [i for i, learnt in zip(ids, mask, strict=True) if learnt]
    assert found.bytes == len(tokenizer.decode(said).encode())


def test_beside_text_everything_of_the_text_is_learnt(
    chat: Callable[..., DataConfig], tmp_path: Path, jsonl: Path
) -> None:
    cfg, root = chat(), tmp_path / "shards"
    assert isinstance(cfg.corpus, ChatCorpus)
    corpora = {
        "text": {"corpus": "files", "path": str(jsonl)},
        "talk": {"corpus": "chat", "path": cfg.corpus.path, "validation_every": 10},
    }
    cfg.corpus = MixtureCorpus(corpora=corpora)
    check_mixture(cfg, 10)
    _, text = arrays(cfg, root, "train/text")
    _, talks = arrays(cfg, root, "train/talk")
    _, both = arrays(cfg, root, "train")
    assert text.all()
    assert 0 < talks.mean() < 1
    assert both.tolist() == [*talks, *text]


def test_templates_that_are_missing_or_differ(chat: Callable[..., DataConfig], tmp_path: Path) -> None:
    cfg = chat()
    (tmp_path / "tokenizer/chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer .* has no chat template: set data\.corpus\.template"):
        prepare(cfg, tmp_path / "shards")
    cfg.tokenizer = BpeTokenizer(vocab_size=300)
    with pytest.raises(ConfigError, match=r"data\.corpus\.template is not set, and a tokenizer that is trained here"):
        check_mixture(cfg, 10)
    part = {"corpus": "chat", "path": "x"}
    cfg.corpus = MixtureCorpus(corpora={"a": {**part, "template": "{{ 1 }}"}, "b": part})
    with pytest.raises(ConfigError, match=r"corpora\.a\.template and .*corpora\.b\.template differ"):
        check_mixture(cfg, 10)


def test_a_tokenizer_is_trained_on_what_is_said(chat: Callable[..., DataConfig], tmp_path: Path) -> None:
    cfg = chat(template=CHATML)
    cfg.tokenizer = BpeTokenizer(vocab_size=300)
    check_mixture(cfg, 10)
    ids, mask = arrays(cfg, tmp_path / "shards", "train")
    tokenizer = load_tokenizer(shard_folder(cfg, tmp_path / "shards"))
    text = tokenizer.decode([i for i, learnt in zip(ids, mask, strict=True) if learnt])
    assert text.startswith(make_text(0, 12) + "<|end|>\nno<|end|>\n")
    assert tokenizer.decode(ids).startswith("<|start|>system\nbe brief<|end|>\n")
