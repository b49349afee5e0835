"""Parquet files as a corpus: the text column, a few rows at a time."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bitnet_train.data.config import FilesCorpus
from bitnet_train.data.corpus import open_corpus, remarks
from bitnet_train.errors import ConfigError


def table(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return path


def texts(path: Path, **settings: object) -> list[str]:
    return [d.text for d in open_corpus(FilesCorpus(path=str(path), **settings)).documents()]  # type: ignore[arg-type]


def test_rows_come_in_order_across_row_groups_and_files(tmp_path: Path) -> None:
    wanted = [f"row {i} héllo" for i in range(50)]
    table(tmp_path / "a/1.parquet", text=wanted[:30], other=list(range(30)))
    table(tmp_path / "b/0.parquet", text=pa.array(wanted[30:], pa.large_string()))
    assert texts(tmp_path) == wanted
    assert texts(tmp_path / "a/1.parquet") == wanted[:30]
    documents = list(open_corpus(FilesCorpus(path=str(tmp_path), validation_every=10)).documents())
    assert [i for i, d in enumerate(documents) if d.validation] == [7, 17, 27, 37, 47]


def test_types_of_text_and_rows_without(tmp_path: Path) -> None:
    words = ["a", None, "b", "", "a"]
    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        assert texts(table(tmp_path / "x.parquet", body=pa.array(words, kind)), text_field="body") == ["a", "b", "a"]
    encoded = pa.array(words).dictionary_encode()
    assert texts(table(tmp_path / "x.parquet", body=encoded), text_field="body") == ["a", "b", "a"]


def test_text_files_stand_before_parquet_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    table(tmp_path / "x.parquet", text=["p"])
    both = FilesCorpus(path=str(tmp_path))
    assert remarks(open_corpus(both)) == []
    (tmp_path / "x.txt").write_text("t")
    assert texts(tmp_path) == ["t"]
    assert remarks(open_corpus(both)) == [f"1 parquet file(s) in {tmp_path} are left out by data.corpus.patterns"]
    assert texts(tmp_path, patterns=["*.parquet"]) == ["p"]
    assert texts(tmp_path, patterns=["*.parquet", "*.txt"]) == ["p", "t"]
    with pytest.raises(ConfigError, match=r"no file that matches \*\.csv"):
        texts(tmp_path, patterns=["*.csv"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"]}, r"x.parquet has no column 'text', only body \(data.corpus.text_field\)\.$"),
        ({"text": [1, 2]}, r"row 1: column 'text' holds int, no text \(data.corpus.text_field\)\.$"),
        ({"text": [["a"]]}, r"row 1: column 'text' holds list, no text"),
        ({"text": [None, b"\xff"]}, r"row 2: column 'text' holds bytes, no text"),
    ],
)
def test_a_wrong_column_is_one_sentence(tmp_path: Path, columns: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        texts(table(tmp_path / "x.parquet", **columns))
    assert "\n" not in str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", text=[f"some text {i}" for i in range(500)])
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[: len(whole) // 2], b"\0" * 400 + whole[400:]):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"x\.parquet cannot be read as parquet: "):
            texts(path)
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    with pytest.raises(ConfigError, match=r"x\.parquet cannot be read as parquet: "):
        texts(table(path, text=bad))


def test_an_edited_file_has_another_identity(tmp_path: Path) -> None:
    source = open_corpus(FilesCorpus(path=str(table(tmp_path / "x.parquet", text=["a"]))))
    before = source.identity()
    table(tmp_path / "x.parquet", text=["a", "b"])
    assert source.identity() != before
