"""The tokenizer that ``transformers.AutoTokenizer`` makes of an export's files."""

from pathlib import Path

import pytest

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.export.huggingface.tokenizer_files import write_tokenizer
from tests.conftest import make_text

ODD_TEXTS = ["", " ", "  leading", "trailing \n\n", "a\r\nb", "né 你好 \U0001f600", "x , y . don't"]


def test_auto_tokenizer_gives_the_runs_ids(bpe: TextTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    bpe.tokenizer.enable_truncation(8)
    try:
        write_tokenizer(bpe, tmp_path, context=64)
    finally:
        bpe.tokenizer.no_truncation()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [make_text(300), *ODD_TEXTS]:
        ids = bpe.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == [bpe.bos_id, *ids]
        assert theirs.decode(ids) == bpe.decode(ids) == text
    assert theirs("a", "b")["input_ids"] == [bpe.bos_id, *bpe.encode("a"), bpe.bos_id, *bpe.encode("b")]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (bpe.bos_id, bpe.eos_id, bpe.eos_id)
    assert theirs.model_max_length == 64
    # In a prompt, a special token's name is that token.
    assert theirs("<|endoftext|>", add_special_tokens=False)["input_ids"] == [bpe.eos_id]
