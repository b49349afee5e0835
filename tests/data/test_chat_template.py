"""A tokenizer's chat template: found where transformers keeps it, saved with the run, handed on with exports."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bitnet_train.data.chat_template import check_documents_apart
from bitnet_train.data.config import PretrainedTokenizer
from bitnet_train.data.tokenizer import TextTokenizer, load_pretrained, load_tokenizer, read_chat_template
from bitnet_train.errors import ConfigError

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("chat_template.jinja", TEMPLATE, TEMPLATE),
        ("tokenizer_config.json", json.dumps({"chat_template": TEMPLATE}), TEMPLATE),
        (
            "tokenizer_config.json",
            json.dumps(
                {"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]}
            ),
            TEMPLATE,
        ),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "tools", "template": "x"}]}), None),
        ("tokenizer_config.json", json.dumps({"chat_template": 3}), None),
        ("tokenizer_config.json", "{}", None),
        ("tokenizer_config.json", "[1]", None),
        ("tokenizer_config.json", "{", None),
        ("other", "", None),
    ],
)
def test_where_it_is_looked_for(name: str, content: str, wanted: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_chat_template(tmp_path) == wanted


@pytest.mark.parametrize(
    ("template", "bos", "eos", "refused"),
    [
        ("{{ m.content }}<|endoftext|>", 0, 0, True),
        ("{{ m.content }}{{ eos_token }}", 0, 0, True),
        ("{{ m.content }}\n", 0, 0, False),
        ("{{ m.content }}{{ eos_token }}", 0, 1, False),
        (None, 0, 0, False),
    ],
)
def test_conversations_cannot_be_told_apart_by_what_ends_turns(
    template: str | None, bos: int, eos: int, refused: bool, bpe: TextTokenizer
) -> None:
    assert bpe.tokenizer.id_to_token(0) == "<|endoftext|>"
    tokenizer = replace(bpe, chat_template=template, bos_id=bos, eos_id=eos)
    if not refused:
        check_documents_apart(tokenizer)
        return
    with pytest.raises(ConfigError, match=r"by their first token, <\|endoftext\|>, which also ends turns"):
        check_documents_apart(tokenizer)


def test_it_stays_with_the_tokenizer(bpe: TextTokenizer, tmp_path: Path) -> None:
    bpe.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    cfg = PretrainedTokenizer(source=str(tmp_path), vocab_size=400, bos="<|endoftext|>", eos="<|endoftext|>")
    loaded = load_pretrained(cfg)
    assert loaded.chat_template == TEMPLATE
    loaded.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == TEMPLATE
    replace(loaded, chat_template=None).save(tmp_path / "plain")
    assert load_tokenizer(tmp_path / "plain").chat_template is None
