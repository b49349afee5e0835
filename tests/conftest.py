"""What all tests share: fixed random numbers, a calm hypothesis, and a tiny corpus on disk."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra.core.config_store import ConfigStore
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Before anything imports Triton, which decides at its import: its kernels run in its interpreter here.
    os.environ["TRITON_INTERPRET"] = "1"

from bitnet_train.data.config import BpeTokenizer, DataConfig, FilesCorpus
from bitnet_train.data.tokenizer import TextTokenizer, train_bpe

# Hydra copies all registered recipes for every configuration it composes, a fifth of the time of composing. What it
# loads of them it copies once more, so none is changed.
ConfigStore.__deepcopy__ = lambda self, memo: self

settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("suite")

WORDS = [
    "def",
    "return",
    "self",
    "import",
    "for",
    "while",
    "class",
    "if",
    "else",
    "None",
    "True",
    "print",
    "range",
    "len",
    "héllo",
    "naïve",
    "你好",
    "x",
    "y",
    "z",
    "+",
    "=",
    "(",
    ")",
    ":",
]


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny tensors, where a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_text(index: int, words: int = 60) -> str:
    """Document ``index``: words in an order of its own, with newlines."""
    picks = [WORDS[(index * 7919 + i * i * 31 + i * (index + 3)) % len(WORDS)] for i in range(words)]
    return f"document {index}\n" + " ".join(picks) + "\n"


@pytest.fixture
def texts() -> list[str]:
    """60 different short documents."""
    return [make_text(i) for i in range(60)]


@pytest.fixture
def jsonl(tmp_path: Path, texts: list[str]) -> Path:
    """The 60 documents as one jsonl file."""
    path = tmp_path / "corpus" / "texts.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def data_config(jsonl: Path) -> Callable[..., DataConfig]:
    """Makes a DataConfig over the jsonl file; keyword arguments override its fields."""

    def make(**fields: object) -> DataConfig:
        wanted = {
            "corpus": FilesCorpus(path=str(jsonl)),
            "tokenizer": BpeTokenizer(vocab_size=300),
            "sequence_length": 16,
        }
        return DataConfig(**{**wanted, **fields})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def bpe() -> TextTokenizer:
    """A byte-level BPE of 400 ids."""
    return train_bpe([make_text(i) for i in range(60)], BpeTokenizer(vocab_size=400))
