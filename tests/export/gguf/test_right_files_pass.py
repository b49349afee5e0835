"""Verification accepts what the writers write. What llama.cpp says is in test_llama_cpp.py."""

from pathlib import Path
from typing import Any

import pytest

from bitnet_train.export.config import EmbeddingType, ExportDtype
from bitnet_train.export.gguf import verify
from bitnet_train.export.held_out import documents
from tests.conftest import make_text
from tests.export.conftest import MakeExport, held_by
from tests.export.gguf.passing import READ_CHECKS, passes


@pytest.mark.parametrize("kind", held_by("gguf-i2_s"))
def test_i2_s_passes(kind: str, exported: MakeExport, tmp_path: Path) -> None:
    report = passes(exported(kind, "gguf-i2_s").copy(tmp_path / "x"), READ_CHECKS | {"token ids of held-out text"})
    assert report.consumer == "bitnet_train's reader"


@pytest.mark.parametrize("embedding", list(EmbeddingType))
@pytest.mark.parametrize("dtype", list(ExportDtype))
def test_every_type_of_the_unquantised_tensors_passes(
    embedding: EmbeddingType, dtype: ExportDtype, exported: MakeExport, tmp_path: Path
) -> None:
    passes(exported("wide mixed", "gguf-i2_s", embedding=embedding, dtype=dtype).copy(tmp_path / "x"), READ_CHECKS)


@pytest.mark.parametrize("format_name", ["gguf-tq1_0", "gguf-tq2_0"])
@pytest.mark.parametrize("kind", held_by("gguf-tq2_0"))
def test_readers_pass_the_main_lines_files(
    kind: str, format_name: str, exported: MakeExport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: Any) -> None:
        raise RuntimeError("not asked here")

    monkeypatch.setattr(verify, "ask_llama_cpp", ask)
    report = exported(kind, format_name).copy(tmp_path / "x").verify()
    assert [check.name for check in report.failed] == ["runs in llama.cpp"]
    assert {check.name for check in report.checks} >= READ_CHECKS


def test_the_comparison_is_made_on_real_documents(exported: MakeExport) -> None:
    run = exported("wide silu", "gguf-tq2_0").run
    assert documents(run.held_out.ids, run.tokenizer) == [make_text(i) for i in range(100, 104)]
