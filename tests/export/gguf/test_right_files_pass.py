"""Verification accepts what the writers write; llama.cpp itself runs the files of its main line."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bitnet_train.export.config import EmbeddingType, ExportDtype
from bitnet_train.export.gguf.llama_cpp_child import ask_llama_cpp
from bitnet_train.export.gguf.reader import gguf_path
from bitnet_train.export.held_out import documents
from bitnet_train.export.report import VerificationReport
from tests.conftest import make_text
from tests.export.conftest import Export, MakeExport, held_by

MAIN_LINE = ("gguf-tq1_0", "gguf-tq2_0")
READ = {"codes", "scales", "types of tensors", "unquantised tensors", "perplexity of what was read", "config: model"}
RUN = {
    "token ids of held-out text", "special tokens added", "text decoded from ids", "held-out perplexity",
    "text generated",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _llama_cpp_is_there() -> None:
    """These tests are the only proof that llama.cpp reads our files: without it they fail instead of being skipped."""
    assert import_module("llama_cpp").__version__


def passes(export: Export, checks: set[str]) -> VerificationReport:
    report = export.verify()
    assert not report.failed
    assert {check.name for check in report.checks} >= checks
    saved = json.loads((export.folder / "verification.json").read_text())
    assert saved["passed"] is True
    assert saved["format"] == export.format_name
    return report


@pytest.mark.parametrize("kind", held_by("gguf-i2_s"))
def test_i2_s_passes(kind: str, exported: MakeExport, tmp_path: Path) -> None:
    report = passes(exported(kind, "gguf-i2_s").copy(tmp_path / "x"), READ | {"token ids of held-out text"})
    assert report.consumer == "bitnet_train's reader"


@pytest.mark.parametrize("embedding", list(EmbeddingType))
@pytest.mark.parametrize("dtype", list(ExportDtype))
def test_every_type_of_the_unquantised_tensors_passes(
    embedding: EmbeddingType, dtype: ExportDtype, exported: MakeExport, tmp_path: Path
) -> None:
    passes(exported("wide mixed", "gguf-i2_s", embedding=embedding, dtype=dtype).copy(tmp_path / "x"), READ)


@pytest.mark.parametrize("format_name", MAIN_LINE)
@pytest.mark.parametrize("kind", ["wide silu", "wide llama"])
def test_llama_cpp_runs_it(kind: str, format_name: str, exported: MakeExport, tmp_path: Path) -> None:
    report = passes(exported(kind, format_name).copy(tmp_path / "x"), READ | RUN)
    assert report.consumer.startswith("llama-cpp-python ")
    assert report.sample.startswith("def ")
    assert len(report.sample) > len("def ")


CASES: list[tuple[str, dict[str, Any]]] = [
    ("wide llama untied", {}),
    ("wide groups", {}),
    ("wide llama rows", {}),
    ("wide rows", {"embedding": EmbeddingType.f32}),
    ("wide binary", {"embedding": EmbeddingType.q8_0}),
    ("wide mixed", {"embedding": EmbeddingType.q6_k}),
    ("wide mixed", {"dtype": ExportDtype.bfloat16}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_llama_cpp_runs_every_kind(kind: str, options: dict[str, Any], exported: MakeExport, tmp_path: Path) -> None:
    passes(exported(kind, "gguf-tq2_0", **options).copy(tmp_path / "x"), READ | RUN)


def test_llama_cpp_gives_the_ids_of_odd_texts(exported: MakeExport) -> None:
    export = exported("wide silu", "gguf-tq2_0")
    tokenizer = export.run.tokenizer
    texts = [
        "a", "  leading", "trailing \n\n", "a\r\nb", "né 你好 \U0001f600", "x , y . don't I'LL", " \t \n  x",
        "0123456789 1 22 333 4444", "a<|endoftext|>b", "\u00a0x\u200b", "\x01\x7f", " " * 60 + "y", make_text(300),
    ]  # fmt: skip
    path = gguf_path(export.folder)
    assert path is not None
    answer = ask_llama_cpp(path, [[0, 1, 2]], texts, "def ", 3)
    assert answer["token_ids"] == [tokenizer.encode(text) for text in texts]
    assert answer["started_ids"][:3] == [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts[:3]]
    assert answer["back"] == texts
    assert answer["completion"].startswith("def ")


def test_the_comparison_is_made_on_real_documents(exported: MakeExport) -> None:
    run = exported("wide silu", "gguf-tq2_0").run
    assert documents(run.held_out.ids, run.tokenizer) == [make_text(i) for i in range(100, 104)]
