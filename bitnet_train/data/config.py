"""Where text comes from and how it becomes batches: the ``data`` part of the configuration.

Images, the other kind of ``data``, are in :mod:`bitnet_train.data.images.config`.
"""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from bitnet_train.errors import ConfigError


@dataclass
class CorpusConfig:
    """Base of the corpora; every subclass is an option of the ``data/corpus`` group."""

    name: str = MISSING


@dataclass
class StdlibCorpus(CorpusConfig):
    """The source of the running Python's standard library: real text that needs no download."""

    name: str = "stdlib"
    # Document i (in the order of sorted paths) is validation when i % validation_every == 7.
    validation_every: int = 50


@dataclass
class FilesCorpus(CorpusConfig):
    """Local text and jsonl files (also .gz), one document per text file and per jsonl line."""

    name: str = "files"
    # A file, or a folder that is searched recursively.
    path: str = ""
    # Which files of a folder are read.
    patterns: list[str] = field(default_factory=lambda: ["*.txt", "*.md", "*.jsonl", "*.txt.gz", "*.jsonl.gz"])
    # Field of a jsonl line that holds the text.
    text_field: str = "text"
    # A file or folder of validation documents; null takes every validation_every-th document of path instead.
    validation_path: str | None = None
    # Document i is validation when i % validation_every == 7 (only without validation_path).
    validation_every: int = 50


CORPUS_CONFIGS: dict[str, type[CorpusConfig]] = {"stdlib": StdlibCorpus, "files": FilesCorpus}


@dataclass
class TokenizerConfig:
    """Base of the tokenizers; every subclass is an option of the ``data/tokenizer`` group."""

    name: str = MISSING
    # Number of token ids, and rows of the model's embedding.
    vocab_size: int = MISSING


@dataclass
class BpeTokenizer(TokenizerConfig):
    """A byte-level BPE trained on the training documents, with GPT-2's pre-tokenizer (as llama.cpp's ``gpt-2``)."""

    name: str = "bpe"
    vocab_size: int = 4096
    # Special token that starts every document and ends generation.
    end_of_text: str = "<|endoftext|>"


@dataclass
class PretrainedTokenizer(TokenizerConfig):
    """An existing tokenizer.json: a local file, a local folder, or a Hugging Face hub repository."""

    name: str = "pretrained"
    vocab_size: int = 128256
    # Path of a tokenizer.json or of a folder that holds one, or a hub name such as microsoft/bitnet-b1.58-2B-4T.
    source: str = ""
    # Branch, tag or commit of the hub repository.
    revision: str = "main"
    # Token that starts every document, and token that ends generation.
    bos: str = "<|begin_of_text|>"
    eos: str = "<|end_of_text|>"


TOKENIZER_CONFIGS: dict[str, type[TokenizerConfig]] = {"bpe": BpeTokenizer, "pretrained": PretrainedTokenizer}


class Verify(Enum):
    """How thoroughly token shards are compared with their manifest before training."""

    auto = "auto"
    full = "full"
    quick = "quick"


@dataclass
class DatasetConfig:
    """Base of what models are trained on; a file of the ``data`` group is of one of its subclasses, by its ``name``."""

    name: str = MISSING


@dataclass
class DataConfig(DatasetConfig):
    """Text; the kind of a file that gives no name."""

    name: str = "text"
    corpus: CorpusConfig = field(default_factory=StdlibCorpus)
    tokenizer: TokenizerConfig = field(default_factory=BpeTokenizer)
    # Tokens per training sequence.
    sequence_length: int = 256
    # Keep attention inside documents when several are packed into one sequence.
    attend_within_documents: bool = False
    # Loader processes; 0 loads in the training process.
    workers: int = 0
    # Tokens that validation looks at, from the start of the validation shards; null for all.
    validation_tokens: int | None = None
    # Tokens per shard file.
    shard_tokens: int = 100_000_000
    # Compare every byte of the shards with the manifest (full), sizes and samples (quick), or full up to 4 GiB (auto).
    verify: Verify = Verify.auto
    # Prepare again even if prepared shards exist (command=prepare).
    rebuild: bool = False


def check_data(cfg: DataConfig, context: int) -> None:
    """Raises ConfigError when the data settings contradict themselves or the model's context."""
    if cfg.sequence_length < 2:
        raise ConfigError(f"data.sequence_length is {cfg.sequence_length}; it must be at least 2.")
    if cfg.sequence_length > context:
        raise ConfigError(f"data.sequence_length={cfg.sequence_length} is longer than model.context={context}.")
    if cfg.workers < 0:
        raise ConfigError(f"data.workers is {cfg.workers}; it must be 0 or more.")
    if cfg.shard_tokens < cfg.sequence_length + 1:
        raise ConfigError(f"data.shard_tokens={cfg.shard_tokens} is less than one sequence of {cfg.sequence_length}.")
    if cfg.validation_tokens is not None and cfg.validation_tokens < cfg.sequence_length:
        raise ConfigError(
            f"data.validation_tokens={cfg.validation_tokens} is less than one sequence of {cfg.sequence_length}."
        )
    if getattr(cfg.corpus, "validation_every", 50) < 8:
        raise ConfigError("data.corpus.validation_every must be at least 8 (document 7 of each round is validation).")
    if isinstance(cfg.tokenizer, BpeTokenizer) and cfg.tokenizer.vocab_size < 257:
        raise ConfigError(
            f"data.tokenizer.vocab_size={cfg.tokenizer.vocab_size} is too small for bytes and a special "
            "token: use 257 or more."
        )
    if isinstance(cfg.tokenizer, PretrainedTokenizer) and not cfg.tokenizer.source:
        raise ConfigError(
            "data.tokenizer.source is empty: give a tokenizer.json, a folder that holds one, or a hub name."
        )
