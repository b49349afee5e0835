"""Hub data sets: local folders in their formats, and what is said when the hub cannot be reached."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from bitnet_train.data.config import HubCorpus
from bitnet_train.data.corpus import identity_since, open_corpus
from bitnet_train.data.document import Document
from bitnet_train.errors import ConfigError

TEXTS = [f"text {i} héllo" for i in range(20)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def rows(**columns: object) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


def documents(folder: Path, **settings: object) -> list[Document]:
    return list(open_corpus(HubCorpus(path=str(folder), **settings)).documents())  # type: ignore[arg-type]


def write(folder: Path, kind: str) -> Path:
    data = rows(text=TEXTS, number=list(range(20)))
    folder.mkdir()
    if kind == "saved":
        data.save_to_disk(str(folder))
    elif kind == "saved splits":
        datasets.DatasetDict(train=data).save_to_disk(str(folder))
    elif kind == "arrow":
        data.save_to_disk(str(folder / "saved"))
        next((folder / "saved").glob("*.arrow")).rename(folder / "train.arrow")
        for file in (folder / "saved").iterdir():
            file.unlink()
    else:
        getattr(data, f"to_{kind}")(str(folder / f"train.{kind}"))
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "json", "csv", "arrow", "saved", "saved splits"])
def test_local_folders_give_their_rows_in_order(tmp_path: Path, kind: str, streaming: bool) -> None:
    folder = write(tmp_path / "data", kind)
    found = documents(folder, streaming=streaming, validation_every=10)
    assert [d.text for d in found] == TEXTS
    assert [i for i, d in enumerate(found) if d.validation] == [7, 17]
    assert documents(folder, streaming=streaming, max_documents=3) == found[:3]


@pytest.mark.parametrize("kind", ["parquet", "json", "csv", "arrow"])
def test_a_single_file(tmp_path: Path, kind: str) -> None:
    file = next(path for path in write(tmp_path / "data", kind).iterdir() if path.is_file())
    assert [d.text for d in documents(file)] == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_subsets_and_chosen_files(tmp_path: Path, streaming: bool) -> None:
    for name in ("train", "validation"):
        rows(text=[f"{name} {i}" for i in range(3)]).to_parquet(str(tmp_path / f"{name}-00000.parquet"))
    found = documents(tmp_path, validation_split="validation", streaming=streaming)
    assert found == [
        *(Document(f"train {i}", False) for i in range(3)),
        *(Document(f"validation {i}", True) for i in range(3)),
    ]
    chosen = documents(tmp_path, data_files=["validation-*.parquet"], streaming=streaming)
    assert [d.text for d in chosen] == [f"validation {i}" for i in range(3)]
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- {config_name: a, data_files: train-*}\n- {config_name: b, data_files: validation-*}\n---\n"
    )
    assert [d.text for d in documents(tmp_path, subset="b", streaming=streaming)] == [
        f"validation {i}" for i in range(3)
    ]
    with pytest.raises(ConfigError, match=r"cannot be read: .*subset|cannot be read: .*[Cc]onfig"):
        documents(tmp_path, subset="c", streaming=streaming)


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    rows(text=["a", None, "", "b"]).to_parquet(str(tmp_path / "x.parquet"))
    assert [d.text for d in documents(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_field": "body"}, r"text_field=body is no column of .*, which has text, number"),
        ({"text_field": "number"}, r"row 1: column 'number' holds int, no text"),
        ({"split": "test"}, r"cannot be read: .*test"),
        ({"data_files": ["*.nothing"]}, r"cannot be read: "),
        ({"revision": "main"}, r"revision has no meaning here: .* is local"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    tmp_path: Path, settings: dict[str, object], message: str, streaming: bool
) -> None:
    folder = write(tmp_path / "data", "parquet")
    with pytest.raises(ConfigError, match=message) as caught:
        documents(folder, streaming=streaming, **settings)
    assert "\n" not in str(caught.value)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    for path, message in (
        ("", "path is not set"),
        (str(tmp_path / "none"), "does not exist"),
        ("./none", "does not exist"),
        (str(tmp_path), "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            list(open_corpus(HubCorpus(path=path)).documents())
    (tmp_path / "x.bin").write_text("x")
    with pytest.raises(ConfigError, match=r"is no arrow, csv, .* file"):
        documents(tmp_path / "x.bin")
    (tmp_path / "x.parquet").write_text("x")
    with pytest.raises(ConfigError, match="cannot be read"):
        documents(tmp_path / "x.parquet")
    saved = write(tmp_path / "saved", "saved")
    with pytest.raises(ConfigError, match="has no split 'test', only train"):
        documents(saved, split="test")
    with pytest.raises(ConfigError, match=r"subset has no meaning here: .* is what save_to_disk wrote"):
        documents(saved, subset="a")


def test_the_identity_of_local_files_changes_with_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", "parquet")
    source = open_corpus(HubCorpus(path=str(folder)))
    before = source.identity()
    (folder / ".hidden").write_text("x")
    assert identity_since(source, before) == before == source.identity()
    rows(text=["more"]).to_parquet(str(folder / "train.parquet"))
    assert identity_since(source, before) != before


def test_a_hub_repository_is_not_asked_once_its_shards_are_made() -> None:
    source = open_corpus(HubCorpus(path="someone/something"))
    assert identity_since(source, {"commit": "abc"}) == {"commit": "abc"}


def test_an_unreachable_hub_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "bitnet_train", "+recipe=tiny", "data=hub", "data.corpus.path=someone/something"]
    done = subprocess.run(
        [*command, "command=prepare", f"paths.data={tmp_path}/shards"],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("bitnet_train: data.corpus.path=someone/something cannot be read: Couldn't reach ")
    assert list((tmp_path / "shards").iterdir()) == []
