"""An export's folder appears whole or not at all, and says what it was made from."""

import json
from pathlib import Path

import pytest

from bitnet_train.errors import ConfigError
from bitnet_train.export.folder import (
    ORIGIN_FILE,
    panics_as_errors,
    read_json,
    read_step,
    replaced_folder,
    shown,
    write_origin,
)
from bitnet_train.export.writers import is_export, load_any_export
from tests.export.conftest import MakeExport


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "x" / "export"
    for content in ("one", "two"):
        with replaced_folder(folder) as partial:
            assert partial != folder
            (partial / content).write_text(content)
        assert [path.name for path in folder.iterdir()] == [content]
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def write_and_stop(folder: Path, error: type[BaseException]) -> None:
    with replaced_folder(folder) as partial:
        (partial / "new").write_text("")
        raise error("stop")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, ConfigError])
def test_what_stops_on_the_way_leaves_the_old_folder(error: type[BaseException], tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "old").write_text("")
    with pytest.raises(error):
        write_and_stop(folder, error)
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_what_a_killed_export_left_is_no_obstacle(tmp_path: Path) -> None:
    with replaced_folder(tmp_path / "export") as partial:
        left = partial
    left.mkdir()
    (left / "half").write_text("")
    with replaced_folder(tmp_path / "export") as partial:
        assert partial == left
        assert not list(partial.iterdir())


def test_a_disk_that_is_full_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"export cannot be written: No space left on device\.$"),
        replaced_folder(tmp_path / "export"),
    ):
        raise OSError(28, "No space left on device")


def test_the_step_is_read_back(tmp_path: Path) -> None:
    write_origin(tmp_path, "packed", 1200)
    assert read_step(tmp_path) == 1200
    assert json.loads((tmp_path / ORIGIN_FILE).read_text()) == {"format": "packed", "step": 1200}


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"step": "7"}', '{"step": -1}', '{"step": true}', '{"step": 1.5}']
)
def test_a_step_that_is_not_readable_is_unknown(content: str, tmp_path: Path) -> None:
    (tmp_path / ORIGIN_FILE).write_text(content)
    assert read_step(tmp_path) is None


def test_a_folder_that_does_not_say_is_of_an_unknown_step(tmp_path: Path) -> None:
    assert read_step(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"", "is damaged"),
        (b"\xff\xfe{}", "is damaged"),
        (b"[1]", "it holds no object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is damaged"),
        (b"[" * 100_000, "is damaged"),
    ],
)
def test_json_that_is_damaged_is_one_sentence(content: bytes, pattern: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ConfigError, match=pattern) as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


def test_names_are_shown_as_they_are_unless_they_break_the_line() -> None:
    assert shown("model.layers.0.mlp") == "model.layers.0.mlp"
    assert shown("你好") == "你好"
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 10**6)) < 100


def test_a_panic_in_rust_becomes_an_error_and_nothing_else_does() -> None:
    class PanicException(BaseException):
        """As pyo3 calls it."""

    with pytest.raises(ValueError, match="out of range"), panics_as_errors():
        raise PanicException("out of range")
    with pytest.raises(KeyboardInterrupt), panics_as_errors():
        raise KeyboardInterrupt


ANY = {
    "hf-packed": "2b4t",
    "hf-master": "2b4t",
    "hf-dense": "2b4t",
    "packed": "rows",
    "gguf-tq2_0": "wide silu",
    "gguf-tq1_0": "wide silu",
    "gguf-i2_s": "half wide 2b4t",
}


@pytest.mark.parametrize("format_name", ANY)
def test_an_export_of_any_format_is_recognised_and_loads(format_name: str, exported: MakeExport) -> None:
    export = exported(ANY[format_name], format_name)
    assert is_export(export.folder)
    decoder, tokenizer = load_any_export(export.folder)
    assert decoder.cfg.vocab == 416
    assert tokenizer.encode("def x") == export.run.tokenizer.encode("def x")


def test_another_folder_is_no_export(tmp_path: Path) -> None:
    assert not is_export(tmp_path)
