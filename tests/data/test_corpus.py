"""The corpora: which documents, in which order, and what is refused."""

import gzip
import json
import os
import sysconfig
from pathlib import Path

import pytest

from bitnet_train.data.config import CorpusConfig, FilesCorpus, StdlibCorpus
from bitnet_train.data.corpus import Document, FilesSource, StdlibSource, open_corpus
from bitnet_train.errors import ConfigError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path | str, **fields: object) -> list[Document]:
    return list(open_corpus(FilesCorpus(path=str(path), **fields)).documents())  # type: ignore[arg-type]


def texts(path: Path | str, **fields: object) -> list[str]:
    return [document.text for document in read(path, **fields)]


# --- the standard library ---


def test_stdlib_is_sorted_without_tables_tests_and_duplicates(tmp_path: Path) -> None:
    source = StdlibSource(StdlibCorpus())
    source.root = tmp_path
    kept = ["a.py", "a/b.py", "a/test.py", "a_b.py", "json/tool.py", "z.py"]  # sorted as posix strings
    for i, name in enumerate(kept):
        write(tmp_path / name, f"# {i}\n")
    for name in ("encodings/x.py", "pydoc_data/topics.py", "test/a.py", "json/tests/a.py", "idlelib/idle_test/a.py",
                 "site-packages/torch/a.py", "dist-packages/a.py", "__pycache__/a.py"):  # fmt: skip
        write(tmp_path / name, f"# left out {name}\n")
    write(tmp_path / "zz.py", "# 0\n")  # the same text as a.py
    write(tmp_path / "b.txt", "# no Python\n")
    order = sorted(kept)
    assert [d.text for d in source.documents()] == [f"# {kept.index(name)}\n" for name in order]


def test_stdlib_holds_out_documents_7_57_and_so_on_counted_without_duplicates(tmp_path: Path) -> None:
    source = StdlibSource(StdlibCorpus(validation_every=50))
    source.root = tmp_path
    for i in range(120):
        write(tmp_path / f"m{i:03}.py", f"# {i}\n")
    write(tmp_path / "m000b.py", "# 0\n")  # a duplicate does not shift the count
    held_out = [d.text for d in source.documents() if d.validation]
    assert held_out == ["# 7\n", "# 57\n", "# 107\n"]


def test_the_real_stdlib_is_there_and_repeatable() -> None:
    source = StdlibSource(StdlibCorpus())
    first = list(source.documents())
    assert len(first) > 300
    assert first == list(source.documents())
    assert len({d.text for d in first}) == len(first)
    assert sum(d.validation for d in first) == (len(first) - 8) // 50 + 1
    library = Path(sysconfig.get_paths()["stdlib"])
    assert (library / "abc.py").read_text() in {d.text for d in first}
    assert source.identity() == StdlibSource(StdlibCorpus()).identity()


def test_a_python_without_source_is_one_clear_error(tmp_path: Path) -> None:
    source = StdlibSource(StdlibCorpus())
    source.root = tmp_path
    with pytest.raises(ConfigError, match=r"data\.corpus=files"):
        list(source.documents())


def test_broken_bytes_in_the_stdlib_do_not_stop_it(tmp_path: Path) -> None:
    source = StdlibSource(StdlibCorpus())
    source.root = tmp_path
    write(tmp_path / "latin.py", b"# caf\xe9\n")
    assert [d.text for d in source.documents()] == ["# caf�\n"]


# --- local files ---


def test_every_file_kind_is_read(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": t, "other": 1}) + "\n" for t in ("one", "two"))
    assert texts(write(tmp_path / "a.txt", "whole\nfile\n")) == ["whole\nfile\n"]
    assert texts(write(tmp_path / "a.txt.gz", "packed é")) == ["packed é"]
    assert texts(write(tmp_path / "a.jsonl", lines)) == ["one", "two"]
    assert texts(write(tmp_path / "a.jsonl.gz", lines)) == ["one", "two"]
    assert texts(write(tmp_path / "b.jsonl", '{"body": "b"}\n'), text_field="body") == ["b"]


def test_folders_are_read_recursively_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a.md", "a/c/x.txt", "c.jsonl", "skipped.py", ".hidden.txt"):
        write(tmp_path / name, json.dumps({"text": name}) if name.endswith("jsonl") else name)
    (tmp_path / "folder.txt").mkdir()  # a folder with a file's name
    assert texts(tmp_path) == [".hidden.txt", "a.md", "a/c/x.txt", "a/z.txt", "b.txt", "c.jsonl"]
    assert texts(tmp_path, patterns=["*.py"]) == ["skipped.py"]


def test_only_the_ending_makes_a_file_jsonl(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "data.jsonl.notes.txt", "plain {text")) == ["plain {text"]


def test_empty_files_lines_and_texts_are_no_documents(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.jsonl", '\n  \n{"text": ""}\n{"text": "x"}\n\n')
    assert texts(tmp_path) == ["x"]


def test_characters_survive_including_escaped_pairs_and_line_separators(tmp_path: Path) -> None:
    text = "tab\t \u2028 \x85 \U0001f600 é"
    for escaped in (True, False):
        path = write(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=escaped) + "\n")
        assert texts(path) == [text]


@pytest.mark.parametrize(
    "line",
    ["{broken", '"just text"', "[1]", "17", '{"other": "x"}', '{"text": 3}', '{"text": null}', '{"text": ["a"]}'],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ConfigError, match=r"a\.jsonl line 3 is no JSON object with a text field 'text'"):
        read(path)


def test_half_a_surrogate_pair_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n{"text": "a\\ud83d"}\n')
    with pytest.raises(ConfigError, match=r"line 2 holds half of a surrogate pair"):
        read(path)


def test_text_that_is_not_utf8_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.txt is not UTF-8 text .* at byte 20000"):
        read(write(tmp_path / "a.txt", b"a" * 20000 + b"\xff" + b"b" * 10))
    filler = (json.dumps({"text": "x" * 100}) + "\n").encode() * 500  # more than one read buffer
    with pytest.raises(ConfigError, match=r"a\.jsonl line 501 is not UTF-8"):
        read(write(tmp_path / "a.jsonl", filler + b'{"text": "\xff"}\n'))


def test_damaged_gz_files_are_one_clear_error(tmp_path: Path) -> None:
    good = gzip.compress(os.urandom(4000).hex().encode())
    damaged = {"cut.txt.gz": good[:100], "no.txt.gz": b"not gzip at all", "head.txt.gz": good[:10] + b"\xff" * 200}
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match="cannot be read"):
            read(tmp_path / name)


@pytest.mark.parametrize("key", ["path", "validation_path"])
def test_missing_and_empty_places_are_refused_by_name(tmp_path: Path, key: str) -> None:
    fields = {"path": str(write(tmp_path / "ok.txt", "x"))}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=rf"data\.corpus\.{key}=.*nowhere does not exist"):
        FilesSource(FilesCorpus(**{**fields, key: str(tmp_path / "nowhere")}))
    with pytest.raises(ConfigError, match=rf"data\.corpus\.{key}=.*empty holds no file that matches"):
        FilesSource(FilesCorpus(**{**fields, key: str(tmp_path / "empty")}))


def test_no_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.corpus\.path is not set"):
        open_corpus(FilesCorpus())


def test_every_nth_document_is_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "".join(f'{{"text": "{i}"}}\n' for i in range(30)))
    assert [d.text for d in read(path, validation_every=10) if d.validation] == ["7", "17", "27"]
    assert [d.text for d in read(path) if d.validation] == ["7"]


def test_a_validation_path_replaces_the_held_out_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "".join(f'{{"text": "{i}"}}\n' for i in range(30)))
    held = write(tmp_path / "held" / "v.txt", "validation")
    documents = read(path, validation_path=str(held))
    assert [d.text for d in documents if d.validation] == ["validation"]
    assert sum(not d.validation for d in documents) == 30


def test_validation_files_inside_the_training_folder_are_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "train")
    write(tmp_path / "held" / "v.txt", "validation")
    documents = read(tmp_path, validation_path=str(tmp_path / "held"))
    assert documents == [Document("train", False), Document("validation", True)]
    with pytest.raises(ConfigError, match=r"no files but those of data\.corpus\.validation_path"):
        read(tmp_path, validation_path=str(tmp_path))


def test_identity_changes_with_any_file_and_is_otherwise_stable(tmp_path: Path) -> None:
    path, held = write(tmp_path / "t" / "a.txt", "one"), write(tmp_path / "v" / "v.txt", "held")

    def identity() -> dict[str, str]:
        return open_corpus(FilesCorpus(path=str(tmp_path / "t"), validation_path=str(tmp_path / "v"))).identity()

    seen = [identity()]
    assert identity() == seen[0]
    for change in (
        lambda: path.write_text("two!"),  # another size
        lambda: os.utime(path, ns=(1, 1)),  # the same size, touched
        lambda: held.write_text("held out"),
        lambda: write(tmp_path / "t" / "b.txt", "new"),
        lambda: path.unlink(),
    ):
        change()
        assert identity() not in seen
        seen.append(identity())


def test_an_unregistered_corpus_is_refused() -> None:
    class Other(CorpusConfig):
        pass

    with pytest.raises(ConfigError, match="no entry in"):
        open_corpus(Other(name="other"))
