"""Exports of every format with random damage: they load, or are refused in one sentence."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.export.conftest import MakeExport
from tests.export.hostile import loads_or_is_refused

# Format, kind, file that is damaged, and how much of its beginning: headers, not weights.
TARGETS = [
    ("hf-packed", "2b4t", "config.json", None),
    ("hf-packed", "2b4t", "tokenizer.json", None),
    ("hf-packed", "2b4t", "model.safetensors", 4096),
    ("hf-master", "some float", "config.json", None),
    ("hf-master", "some float", "model.safetensors", 2048),
    ("hf-dense", "2b4t", "model.safetensors", 2048),
    ("packed", "mixed", "config.json", None),
    ("packed", "mixed", "model.safetensors", 4096),
    ("packed", "mixed", "special_tokens.json", None),
    ("gguf-tq2_0", "wide silu", "model-TQ2_0.gguf", 26_000),
    ("gguf-tq1_0", "wide llama", "model-TQ1_0.gguf", 1000),
    ("gguf-i2_s", "half wide 2b4t", "ggml-model-i2_s.gguf", 1000),
]
targets = pytest.mark.parametrize(("format_name", "kind", "file", "begins"), TARGETS, ids=lambda v: str(v))

Damage = Callable[[bytearray, random.Random, int], bytearray]


def flip_bits(content: bytearray, chance: random.Random, end: int) -> bytearray:
    """One to three bits."""
    for _ in range(chance.randint(1, 3)):
        content[chance.randrange(end)] ^= 1 << chance.randrange(8)
    return content


def put_bytes(content: bytearray, chance: random.Random, end: int) -> bytearray:
    """Some bytes in a row of all ones, all zeros, a newline, or what is found elsewhere."""
    at, size = chance.randrange(end), chance.choice([1, 4, 8, 16])
    piece = chance.choice([b"\xff" * size, bytes(size), b"\n" * size, bytes(content[: max(size, 1)])])
    content[at : at + len(piece)] = piece
    return content


def cut_out(content: bytearray, chance: random.Random, end: int) -> bytearray:
    """Without some bytes, so that all that follows has moved."""
    at = chance.randrange(end)
    del content[at : at + chance.choice([1, 2, 8, 32])]
    return content


DAMAGES: tuple[Damage, ...] = (flip_bits, put_bytes, cut_out)


@targets
@settings(max_examples=40)
@given(seed=st.integers(0, 2**30))
def test_random_damage_is_one_sentence(
    format_name: str, kind: str, file: str, begins: int | None, seed: int, exported: MakeExport, tmp_path: Path
) -> None:
    folder, chance = tmp_path / "copy", random.Random(seed)
    if not folder.is_dir():  # once for all examples: only this file changes
        exported(kind, format_name).copy(folder)
    content = bytearray((exported(kind, format_name).folder / file).read_bytes())
    end = min(len(content), begins or len(content))
    (folder / file).write_bytes(chance.choice(DAMAGES)(content, chance, end))
    loads_or_is_refused(folder)


@targets
def test_a_file_that_ends_anywhere_is_one_sentence(
    format_name: str, kind: str, file: str, begins: int | None, exported: MakeExport, tmp_path: Path
) -> None:
    export = exported(kind, format_name).copy(tmp_path / "copy")
    content = (export.folder / file).read_bytes()
    header = min(len(content), begins or len(content))
    # Early lengths one by one, for they cut the fixed fields; then in steps, and just before the end.
    lengths = {*range(40), *range(40, header, max(1, header // 60)), *range(len(content) - 3, len(content))}
    cut = sorted(length for length in lengths if length < len(content))
    loaded = [length for length in cut if _loads_cut(export.folder, file, content, length)]
    # JSON may end in a line break that nothing needs.
    assert set(loaded) <= ({len(content) - 1} if file.endswith(".json") else set())


def _loads_cut(folder: Path, file: str, content: bytes, length: int) -> bool:
    (folder / file).write_bytes(content[:length])
    return loads_or_is_refused(folder)


@targets
def test_a_file_that_goes_on_does_no_harm(
    format_name: str, kind: str, file: str, begins: int | None, exported: MakeExport, tmp_path: Path
) -> None:
    export = exported(kind, format_name).copy(tmp_path / "copy")
    with (export.folder / file).open("ab") as stream:
        stream.write(bytes(4096))
    # More than a GGUF file needs is padding; JSON and safetensors end where they end.
    assert loads_or_is_refused(export.folder) == file.endswith(".gguf")
