"""llama.cpp itself runs the files of its main line, and what it says of wrong ones fails the verification.

These tests are the only proof that llama.cpp reads our files: asked for without it, they fail instead of being skipped.
"""

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bitnet_train.export.config import EmbeddingType, ExportDtype
from bitnet_train.export.gguf import verify
from bitnet_train.export.gguf.llama_cpp_child import ask_llama_cpp
from bitnet_train.export.gguf.reader import gguf_path
from tests.conftest import make_text
from tests.export.conftest import MakeExport
from tests.export.gguf.passing import READ_CHECKS, RUN_CHECKS, passes
from tests.export.gguf.planting import (
    BASE,
    COMMON,
    EPS,
    READ,
    UP,
    Fault,
    drop,
    put,
    rejected,
    rolled_embedding,
    rows_as_trained,
    swap_items,
    without_tensor,
)

pytestmark = pytest.mark.llama_cpp

MAIN_LINE = ("gguf-tq1_0", "gguf-tq2_0")


@pytest.fixture(scope="module", autouse=True)
def _llama_cpp_is_there() -> None:
    assert import_module("llama_cpp").__version__


# Found by llama.cpp itself.
FAULTS: dict[str, tuple[str, Fault]] = {
    "q as it was trained": ("gguf-tq2_0", Fault("wide llama", rows_as_trained, {"codes", "held-out perplexity"})),
    "embedding moved": ("gguf-tq2_0", Fault("wide silu", rolled_embedding, {"held-out perplexity", READ})),
    "rope base": ("gguf-tq2_0", Fault("wide llama", put(BASE, 1e2), {f"config: {BASE}", "held-out perplexity"})),
    "pre-tokenizer": (
        "gguf-tq2_0", Fault("wide silu", put("tokenizer.ggml.pre", "llama-bpe"), {"token ids of held-out text"}),
    ),
    "bos not added": (
        "gguf-tq2_0", Fault("wide silu", put("tokenizer.ggml.add_bos_token", False), {"special tokens added"}),
    ),
    "tokens swapped": (
        "gguf-tq2_0",
        Fault("wide silu", swap_items("tokenizer.ggml.tokens", *COMMON), {"token ids of held-out text"}),
    ),
    "no kind of tokenizer": (
        "gguf-tq2_0",
        Fault("wide silu", drop("tokenizer.ggml.model"), {"config: tokenizer.ggml.model", "runs in llama.cpp"}),
    ),
    "no eps": ("gguf-tq2_0", Fault("wide silu", drop(EPS), {"loads", "runs in llama.cpp"})),
    "missing tensor": ("gguf-tq1_0", Fault("wide silu", without_tensor(UP), {"loads", "runs in llama.cpp"})),
    "unknown architecture": (
        "gguf-tq2_0", Fault("wide silu", put("general.architecture", "nonsense"), {"loads", "runs in llama.cpp"}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("format_name", MAIN_LINE)
@pytest.mark.parametrize("kind", ["wide silu", "wide llama"])
def test_llama_cpp_runs_it(kind: str, format_name: str, exported: MakeExport, tmp_path: Path) -> None:
    report = passes(exported(kind, format_name).copy(tmp_path / "x"), READ_CHECKS | RUN_CHECKS)
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
    passes(exported(kind, "gguf-tq2_0", **options).copy(tmp_path / "x"), READ_CHECKS | RUN_CHECKS)


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


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_rejected(name: str, exported: MakeExport, tmp_path: Path) -> None:
    format_name, fault = FAULTS[name]
    rejected(format_name, fault, exported, tmp_path / "copy")


def test_what_llama_cpp_says_about_a_file_it_cannot_load_is_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"no file of its kind")
    with pytest.raises(RuntimeError, match=r"llama.cpp ended with exit code \d+: .*Failed to load model") as caught:
        ask_llama_cpp(path, [[0, 1]], ["a"], "a", 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda answer: answer.update(new_tokens=0), "text generated"),
        (lambda answer: answer.update(nats=answer["nats"] * 1.01), "held-out perplexity"),
        (lambda answer: answer.update(nats=math.nan), "held-out perplexity"),
        (lambda answer: answer.update(nats=1e9), "held-out perplexity"),
        (lambda answer: answer["token_ids"][1].reverse(), "token ids of held-out text"),
        (lambda answer: answer["started_ids"][1].reverse(), "special tokens added"),
        (lambda answer: answer["back"].reverse(), "text decoded from ids"),
        (lambda answer: answer["token_ids"].pop(), "runs in llama.cpp"),
        (lambda answer: answer.pop("nats"), "runs in llama.cpp"),
    ],
)
def test_every_answer_of_llama_cpp_counts(
    change: Callable[[dict[str, Any]], object],
    check: str,
    exported: MakeExport,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ask(*request: Any) -> dict[str, Any]:
        answer = ask_llama_cpp(*request)
        change(answer)
        return answer

    monkeypatch.setattr(verify, "ask_llama_cpp", ask)
    report = exported("wide silu", "gguf-tq2_0").copy(tmp_path / "copy").verify()
    assert [row.name for row in report.failed] == [check]
