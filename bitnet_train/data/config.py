"""Where text comes from and how it becomes batches: the ``data`` part of the configuration.

Images, the other kind of ``data``, are in :mod:`bitnet_train.data.images.config`.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Union

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
    """Local text, jsonl (both also .gz) and parquet files: one document per text file, jsonl line and parquet row."""

    name: str = "files"
    # A file, or a folder that is searched recursively.
    path: str = ""
    # Which files of a folder are read. A folder in which the default finds none is searched for *.parquet; where text
    # and parquet files lie together, [*.parquet] must be asked for.
    patterns: list[str] = field(default_factory=lambda: ["*.txt", "*.md", "*.jsonl", "*.txt.gz", "*.jsonl.gz"])
    # Field of a jsonl line, or column of a parquet file, that holds the text.
    text_field: str = "text"
    # A file or folder of validation documents; null takes every validation_every-th document of path instead.
    validation_path: str | None = None
    # Document i is validation when i % validation_every == 7 (only without validation_path).
    validation_every: int = 50


@dataclass
class HubCorpus(CorpusConfig):
    """A data set of the Hugging Face hub, or a local folder or file in one of its formats, read with ``datasets``.

    Code of a data set is never run. Once its token shards are made the hub is not asked again: the commit they were
    made from stays with them until data.rebuild=true.
    """

    name: str = "hub"
    # A hub repository such as HuggingFaceFW/fineweb-edu, a local folder (parquet, json, csv, arrow or text files, or
    # what save_to_disk wrote), or a local file.
    path: str = ""
    # Subset (configuration) of the data set, such as sample-10BT; null where there is only one.
    subset: str | None = None
    # Split that is trained on; slices such as train[:5%] work without streaming. Local files without names of splits
    # are all train.
    split: str = "train"
    # Column that holds the text. Rows without text are left out.
    text_field: str = "text"
    # Files or patterns in the repository or folder, such as [data/*.parquet]; null for all that belong to the split.
    data_files: list[str] | None = None
    # Read rows as they come instead of first keeping a copy of the data set in the cache of datasets (HF_HOME).
    streaming: bool = False
    # Branch, tag or commit of a hub repository; null for its main branch as it is when the shards are made.
    revision: str | None = None
    # Rows that are read from the split; null for all.
    max_documents: int | None = None
    # Split of validation documents; null takes every validation_every-th document of split instead.
    validation_split: str | None = None
    # Document i is validation when i % validation_every == 7 (only without validation_split).
    validation_every: int = 50


@dataclass
class ChatCorpus(CorpusConfig):
    """Conversations for supervised fine-tuning: jsonl or parquet with a list of messages (role, content), as
    transformers' chat format. The loss is on the assistant's tokens alone.
    """

    name: str = "chat"
    # A file, or a folder that is searched recursively.
    path: str = ""
    # Which files of a folder are read.
    patterns: list[str] = field(default_factory=lambda: ["*.jsonl", "*.jsonl.gz", "*.parquet"])
    # Field or column that holds the messages.
    messages_field: str = "messages"
    # Chat template: Jinja text, or a file that holds it; null for the tokenizer's own. It is handed on with exports.
    template: str | None = None
    # A file or folder of validation conversations; null takes every validation_every-th conversation of path instead.
    validation_path: str | None = None
    # Conversation i is validation when i % validation_every == 7 (only without validation_path).
    validation_every: int = 50


@dataclass
class MixtureCorpus(CorpusConfig):
    """Several corpora, of whose windows each gets its share of every 1,000 training samples. One tokenizer for all."""

    name: str = "mixture"
    # NAME: {corpus: files, weight: 0.7, path: ..., any other setting of that corpus}. Weights are relative to their sum
    # (1 where none is given); 0 is for what only a later one of data.stages brings in.
    corpora: Any = None


CORPUS_CONFIGS: dict[str, type[CorpusConfig]] = {
    "stdlib": StdlibCorpus,
    "files": FilesCorpus,
    "hub": HubCorpus,
    "chat": ChatCorpus,
    "mixture": MixtureCorpus,
}


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
    # Path of a tokenizer.json or of a folder that holds one (a run, an export, a checkpoint of transformers), or a hub
    # name such as microsoft/bitnet-b1.58-2B-4T.
    source: str = ""
    # Branch, tag or commit of the hub repository.
    revision: str = "main"
    # Token that starts every document, and token that ends generation; null for those that the files beside the
    # tokenizer.json name (a run's own, a model's config.json, tokenizer_config.json); eos for a bos that is none.
    bos: str | None = None
    eos: str | None = None


TOKENIZER_CONFIGS: dict[str, type[TokenizerConfig]] = {"bpe": BpeTokenizer, "pretrained": PretrainedTokenizer}


class Verify(Enum):
    """How thoroughly token shards are compared with their manifest before training."""

    auto = "auto"
    full = "full"
    quick = "quick"


class Shuffle(Enum):
    """How the windows of an epoch are shuffled."""

    full = "full"
    window = "window"
    none = "none"


class DataStage:
    """A part of the run with another mixture, as BitNet b1.58 2B4T's second stage (arXiv 2504.12285, on its data)."""

    # Weight of each corpus from then on; one that is not named gets no samples.
    weights: dict[str, float] = field(default_factory=dict)


# `from` is a keyword in Python, so the field is added here.

# Where the stage begins: an optimizer step (a whole number) or a share of trainer.max_steps (0.8).
DataStage.__annotations__["from"] = Union[int, float]  # noqa: UP007
setattr(DataStage, "from", field(default=MISSING, init=False, repr=False, compare=False))
dataclass(DataStage)


@dataclass
class PrepareConfig:
    """How the work of making token shards is shared out. Their content does not depend on it."""

    # Processes on this machine; 1 tokenises in the command's own (tokenizers uses every core there too).
    processes: int = 1
    # With command=prepare: the number of this job among parts, from 0; null for its place in a SLURM array
    # (sbatch --array=0-15), or 0. Part 0 makes the tokenizer, and whoever finishes last puts the shards together.
    part: int | None = None
    # With command=prepare: jobs that share the work, on any machines that share paths.data; null for the size of the
    # SLURM array, or 1. One more command=prepare without parts does whatever killed ones have left.
    parts: int | None = None
    # Text that is tokenised at a time and then marked as done, MB: what a killed preparation does again. Once part 0
    # has made its plan, that one's counts for all parts.
    unit_mb: float = 64.0
    # Minutes that a part waits for part 0 to make the tokenizer.
    wait_minutes: float = 120.0


def check_prepare(cfg: PrepareConfig, preparing: bool) -> None:
    """Raises ConfigError for work that is shared out wrongly; ``preparing`` with command=prepare."""
    if cfg.processes < 1:
        raise ConfigError(f"data.prepare.processes is {cfg.processes}; it must be at least 1.")
    if not 0 < cfg.unit_mb <= 1e6:  # also not for NaN
        raise ConfigError(f"data.prepare.unit_mb is {cfg.unit_mb}; it must be above 0 and at most 1e6.")
    if not 0 <= cfg.wait_minutes <= 1e6:
        raise ConfigError(f"data.prepare.wait_minutes is {cfg.wait_minutes}; it must be from 0 to 1e6.")
    if (cfg.part is not None or cfg.parts is not None) and not preparing:
        raise ConfigError("data.prepare.part and parts are for command=prepare, on which others wait: leave them out.")
    if cfg.parts is None and cfg.part is not None:
        raise ConfigError(f"data.prepare.part={cfg.part} needs data.prepare.parts, the number of jobs.")
    if cfg.parts is not None and cfg.parts < 1:
        raise ConfigError(f"data.prepare.parts is {cfg.parts}; it must be at least 1.")
    if cfg.parts is not None and cfg.part is not None and not 0 <= cfg.part < cfg.parts:
        raise ConfigError(
            f"data.prepare.part={cfg.part} must be from 0 to {cfg.parts - 1} (data.prepare.parts={cfg.parts})."
        )


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
    # How command=prepare shares out its work.
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    # Order of an epoch's windows: shuffled as a whole (full), blocks of neighbours in shuffled order and shuffled
    # within each (window), or as they lie (none). full reads at random places of all shards, which a shared disk under
    # a corpus of terabytes does not like; window reads one block after the other.
    shuffle: Shuffle = Shuffle.full
    # Windows in a block of shuffle=window; 65536 windows of 2048 tokens are 268 MB of shards (uint16).
    shuffle_window: int = 65536
    # Other mixtures from a given step on: [{from: 0.8, weights: {NAME: 0.5, ...}}]; only with data/corpus=mixture.
    stages: list[DataStage] | None = None


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
    if not 1 <= cfg.shuffle_window < 2**40:
        raise ConfigError(f"data.shuffle_window is {cfg.shuffle_window}; it must be at least 1 (and less than 2^40).")
    if cfg.shuffle is not Shuffle.window and cfg.shuffle_window != DataConfig().shuffle_window:
        raise ConfigError(f"data.shuffle_window has no effect with data.shuffle={cfg.shuffle.value}: remove it, or use "
                          "data.shuffle=window.")  # fmt: skip
    if cfg.validation_tokens is not None and cfg.validation_tokens < cfg.sequence_length:
        raise ConfigError(
            f"data.validation_tokens={cfg.validation_tokens} is less than one sequence of {cfg.sequence_length}."
        )
    check_corpus(cfg.corpus, "data.corpus")
    if isinstance(cfg.tokenizer, BpeTokenizer) and cfg.tokenizer.vocab_size < 257:
        raise ConfigError(
            f"data.tokenizer.vocab_size={cfg.tokenizer.vocab_size} is too small for bytes and a special "
            "token: use 257 or more."
        )
    if isinstance(cfg.tokenizer, PretrainedTokenizer) and not cfg.tokenizer.source:
        raise ConfigError(
            "data.tokenizer.source is empty: give a tokenizer.json, a folder that holds one, or a hub name."
        )


def check_corpus(cfg: CorpusConfig, key: str) -> None:
    """Raises ConfigError when the settings of one corpus, which stand at ``key``, are out of range."""
    if getattr(cfg, "validation_every", 50) < 8:
        raise ConfigError(f"{key}.validation_every must be at least 8 (document 7 of each round is validation).")
    limit = getattr(cfg, "max_documents", None)
    if limit is not None and limit < 1:
        raise ConfigError(f"{key}.max_documents is {limit}; it must be at least 1, or null for all.")
