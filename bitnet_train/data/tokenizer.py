"""Byte-level BPE, trained here or an existing one: a ``tokenizers`` object with the special ids that the rest needs."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bitnet_train.data.config import BpeTokenizer, PretrainedTokenizer, TokenizerConfig
from bitnet_train.data.shards import TOKENIZER_FILE
from bitnet_train.durable import write_atomically
from bitnet_train.errors import ConfigError

SPECIALS_FILE = "special_tokens.json"
# What only a byte-level tokenizer gives back unchanged: case, runs of white space, accents, CJK, an emoji.
PROBE = "Def  héllo\n\t\tworld 你好 \U0001f600."


@dataclass(frozen=True)
class TextTokenizer:
    """A ``tokenizers.Tokenizer`` with the ids of the tokens that start a document and end a generation.

    ``chat_template`` (Jinja, as transformers writes it) turns messages into text; it is handed on with exports.
    """

    tokenizer: Tokenizer
    bos_id: int
    eos_id: int
    chat_template: str | None = None

    def __post_init__(self) -> None:
        # Text is data: a document that mentions "<|endoftext|>" does not end there.
        self.tokenizer.encode_special_tokens = True

    @property
    def vocab_size(self) -> int:
        """The highest id plus one, added tokens included."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens; tokenised in parallel by the library's threads."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, int32 (vocab_size,); 0 for special tokens.

        In byte-level BPE every character of a token's string is one byte.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        special = set(self.tokenizer.get_added_tokens_decoder())
        for token, index in self.tokenizer.get_vocab(with_added_tokens=True).items():
            lengths[index] = 0 if index in special else len(token)
        for index, added in self.tokenizer.get_added_tokens_decoder().items():
            lengths[index] = 0 if added.special else len(added.content.encode())
        return lengths

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and the special ids, which :func:`load_tokenizer` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        # Written here: the library's own errors are bare Exceptions.
        write_atomically(folder / TOKENIZER_FILE, self.tokenizer.to_str(pretty=True))
        content: dict[str, int | str] = {"bos_id": self.bos_id, "eos_id": self.eos_id}
        if self.chat_template is not None:
            content["chat_template"] = self.chat_template
        write_atomically(folder / SPECIALS_FILE, json.dumps(content) + "\n")


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Reads what :meth:`TextTokenizer.save` wrote. Raises ConfigError when it is missing or damaged."""
    try:
        specials = json.loads((folder / SPECIALS_FILE).read_text())
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        template = specials.get("chat_template")
        if template is not None and not isinstance(template, str):
            raise ValueError("chat_template is no text")
        return TextTokenizer(tokenizer, int(specials["bos_id"]), int(specials["eos_id"]), template)
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"{folder} holds no readable tokenizer ({error}).") from None


def train_bpe(texts: Iterable[str], cfg: BpeTokenizer) -> TextTokenizer:
    """Trains a byte-level BPE on ``texts``.

    The pre-tokenizer is GPT-2's regular expression, so that llama.cpp's ``gpt-2`` pre-tokenizer splits text alike. The
    result depends on the texts and ``cfg`` only.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocab_size,
        special_tokens=[AddedToken(cfg.end_of_text, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = tokenizer.token_to_id(cfg.end_of_text)
    assert end is not None  # the trainer was given it
    return TextTokenizer(tokenizer, bos_id=end, eos_id=end)


def load_pretrained(cfg: PretrainedTokenizer) -> TextTokenizer:
    """An existing tokenizer from a local file, a local folder or the Hugging Face hub.

    Raises ConfigError when it cannot be had, lacks the special tokens, has more ids than ``vocab_size``, or is not
    byte-level.
    """
    tokenizer, folder = _open_pretrained(cfg)
    own = read_special_tokens(folder)
    eos = _special_id(cfg, tokenizer, "eos", (cfg.eos, own.get("eos")))
    # Qwen's models have no token that starts a document: the one that ends it stands between two.
    bos = _special_id(cfg, tokenizer, "bos", (cfg.bos, own.get("bos"), eos))
    template = own.get("chat_template") or read_chat_template(folder)
    text_tokenizer = TextTokenizer(tokenizer, bos, eos, template)
    size = text_tokenizer.vocab_size
    if size > cfg.vocab_size:
        raise ConfigError(
            f"{cfg.source} has {size} ids but data.tokenizer.vocab_size={cfg.vocab_size}: raise it to {size} or more."
        )
    probe_ids = text_tokenizer.encode(PROBE)
    counted = int(text_tokenizer.byte_lengths()[probe_ids].sum())
    if text_tokenizer.decode(probe_ids) != PROBE or counted != len(PROBE.encode()):
        raise ConfigError(
            f"{cfg.source} is no byte-level BPE tokenizer (text does not come back byte for byte), so bits per byte "
            "could not be counted: choose a byte-level one."
        )
    return text_tokenizer


def _open_pretrained(cfg: PretrainedTokenizer) -> tuple[Tokenizer, Path]:
    """The tokenizer, and the folder of the files that lie beside it."""
    path = local_source(cfg)
    try:
        if path is not None:
            folder = path if path.is_dir() else path.parent
            return Tokenizer.from_file(str(path / TOKENIZER_FILE if path.is_dir() else path)), folder
        name, _, revision = cfg.source.partition("@")
        revision = revision or cfg.revision
        return Tokenizer.from_pretrained(name, revision=revision), _download_specials(name, revision)
    except Exception as error:  # tokenizers raises bare Exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"data.tokenizer.source={cfg.source} is neither a tokenizer.json, a folder with one, nor a hub repository "
            f"that can be reached ({reason})."
        ) from None


def _special_id(cfg: PretrainedTokenizer, tokenizer: Tokenizer, key: str, choices: tuple[str | int | None, ...]) -> int:
    """The id of the first of ``choices``, tokens or ids, that is one. Raises ConfigError if none is, or it is not in
    the vocabulary."""
    token = next((choice for choice in choices if choice is not None), None)
    if token is None:
        raise ConfigError(
            f"data.tokenizer.{key} is not set, and no file beside the tokenizer.json of {cfg.source} says which "
            "token it is: give data.tokenizer.bos=TOKEN and data.tokenizer.eos=TOKEN."
        )
    index = tokenizer.token_to_id(token) if isinstance(token, str) else token
    if index is None or tokenizer.id_to_token(index) is None:
        raise ConfigError(f"data.tokenizer.{key}={token} is not in the vocabulary of {cfg.source}.")
    return index


def local_source(cfg: PretrainedTokenizer) -> Path | None:
    """The file or folder that ``data.tokenizer.source`` is, or None when it can only be a name on the hub.

    That of a run, ``RUN`` or ``RUN@STEP``, is the tokenizer that the run keeps.
    """
    for source in (cfg.source, cfg.source.partition("@")[0]):
        path = Path(source).expanduser()
        if (path / "tokenizer" / TOKENIZER_FILE).is_file() and not (path / TOKENIZER_FILE).is_file():
            return path / "tokenizer"
        if path.exists():
            return path
    return None


def read_special_tokens(folder: Path) -> dict[str, Any]:
    """What the files in ``folder`` say of "bos" and "eos", tokens or ids, as far as they do; and a run's
    "chat_template".

    A run's own file comes first, then a model's config.json, then tokenizer_config.json.
    """
    own, model, settings = (_read_mapping(folder / n) for n in (SPECIALS_FILE, "config.json", "tokenizer_config.json"))
    found: dict[str, Any] = {"chat_template": own["chat_template"]} if own.get("chat_template") else {}
    for key in ("bos", "eos"):
        index = one_special_id(own.get(f"{key}_id", model.get(f"{key}_token_id")))
        token = settings.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if index is not None:
            found[key] = index
        elif isinstance(token, str):
            found[key] = token
    return found


def one_special_id(named: object) -> int | None:
    """The id in a model's configuration, which may list several that end a generation: then the first. Or None."""
    index = named[0] if isinstance(named, list) and named else named
    return index if isinstance(index, int) and not isinstance(index, bool) and index >= 0 else None


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _download_specials(name: str, revision: str) -> Path:
    """A folder with the small files of a hub repository that say what its special tokens are."""
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "tokenizer_config.json", "chat_template.jinja"]
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a ``transformers`` folder, in chat_template.jinja or tokenizer_config.json, or None.

    Of several named ones the default is taken.
    """
    try:
        if (folder / "chat_template.jinja").is_file():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def build_tokenizer(cfg: TokenizerConfig, texts: Iterable[str]) -> TextTokenizer:
    """The tokenizer of a configuration, trained on ``texts`` if it is of the trained kind."""
    if isinstance(cfg, BpeTokenizer):
        return train_bpe(texts, cfg)
    if isinstance(cfg, PretrainedTokenizer):
        return load_pretrained(cfg)
    raise ConfigError(f"data.tokenizer={cfg.name} is unknown to bitnet_train.data.tokenizer.build_tokenizer")
