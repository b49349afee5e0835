"""A byte-level BPE as the ``tokenizer.ggml.*`` keys of a GGUF file, and back."""

import json
from reprlib import repr as short_repr
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.export.folder import panics_as_errors, shown

# Token types of llama.h.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# How text is split before BPE: llama.cpp's name -> the regular expression (llama-vocab.cpp), None for GPT-2's, which
# the tokenizers library has built in.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {"gpt-2": None, "llama-bpe": LLAMA3, "qwen2": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")}


def pre_tokenizer_name(tokenizer: Tokenizer) -> str:
    """What llama.cpp calls the pre-tokenizer. Raises ConfigError for one that it would split text differently from."""
    definition = json.loads(tokenizer.to_str())
    split = definition["pre_tokenizer"] or {}
    parts = split.get("pretokenizers", [split])
    byte_level = parts[-1]
    fits = byte_level.get("type") == "ByteLevel" and not byte_level.get("add_prefix_space")
    if fits and definition["normalizer"] is None:
        if len(parts) == 1 and byte_level.get("use_regex", True):
            return "gpt-2"
        if len(parts) == 2 and parts[0].get("type") == "Split" and parts[0].get("behavior") == "Isolated":
            pattern = parts[0].get("pattern", {}).get("Regex")
            for name, regex in PRE_TOKENIZERS.items():
                if regex is not None and pattern == regex:
                    return name
    raise ConfigError(
        "A GGUF file names its pre-tokenizer, and this tokenizer splits text like none of "
        f"{', '.join(PRE_TOKENIZERS)}: export to hf-* or packed."
    )


def tokenizer_metadata(tokenizer: TextTokenizer, vocab: int) -> dict[str, Any]:
    """The ``tokenizer.ggml.*`` keys, ``vocab`` tokens long: ids that the tokenizer does not use get unused tokens.

    Raises ConfigError for a tokenizer that llama.cpp does not know.
    """
    definition = json.loads(tokenizer.tokenizer.to_str())
    if definition["model"]["type"] != "BPE":
        raise ConfigError(f"A GGUF file needs a byte-level BPE tokenizer, not {definition['model']['type']}.")
    names = {index: token for token, index in tokenizer.tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.tokenizer.get_added_tokens_decoder()
    tokens = [names.get(index, f"[PAD{index}]") for index in range(vocab)]
    types = [
        (CONTROL if added[index].special else USER_DEFINED) if index in added else NORMAL if index in names else UNUSED
        for index in range(vocab)
    ]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in definition["model"]["merges"]]
    if not merges:
        # gguf-py leaves empty lists out, and llama.cpp loads no byte-level BPE without the key.
        raise ConfigError("A GGUF file needs merges, and this tokenizer has no merges: export to hf-* or packed.")
    template = {} if tokenizer.chat_template is None else {"tokenizer.chat_template": tokenizer.chat_template}
    return {
        "tokenizer.ggml.model": "gpt2",
        # Without it llama.cpp splits text in a way of its own, and the model reads garbage.
        "tokenizer.ggml.pre": pre_tokenizer_name(tokenizer.tokenizer),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * vocab,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.padding_token_id": tokenizer.eos_id,
        "tokenizer.ggml.add_bos_token": True,
        **template,
    }


def tokenizer_obstacle(tokenizer: TextTokenizer, vocab: int) -> str | None:
    """Why the tokenizer has no GGUF form, or None when it has one."""
    try:
        tokenizer_metadata(tokenizer, vocab)
    except ConfigError as error:
        return str(error).rstrip(".")
    return None


def tokenizer_from_metadata(metadata: dict[str, Any]) -> TextTokenizer:
    """The tokenizer that the keys describe. Raises ConfigError when they are missing or contradict each other."""
    try:
        tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        name, model = metadata["tokenizer.ggml.pre"], metadata["tokenizer.ggml.model"]
        bos, eos = metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
        if model != "gpt2" or name not in PRE_TOKENIZERS:
            raise ValueError(f"model {short_repr(model)}, pre-tokenizer {short_repr(name)}")
        vocab = metadata.get(f"{metadata.get('general.architecture')}.vocab_size", len(tokens))
        if not len(set(tokens)) == len(tokens) == len(types) <= vocab:
            raise ValueError(f"{len(tokens)} tokens, {len(types)} types, vocabulary of {vocab}")
        if not all(type(index) is int and 0 <= index < len(tokens) for index in (bos, eos)):
            raise ValueError(f"bos {short_repr(bos)}, eos {short_repr(eos)}")
        vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
        if not {tokens[bos], tokens[eos]} <= vocabulary.keys():
            raise ValueError("bos or eos is an unused token")
        with panics_as_errors():
            tokenizer = Tokenizer(models.BPE(vocabulary, merges))
            tokenizer.pre_tokenizer = _pre_tokenizer(name)
            tokenizer.decoder = decoders.ByteLevel()
            for token, kind in zip(tokens, types, strict=True):
                if kind in (CONTROL, USER_DEFINED):
                    tokenizer.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])
        template = metadata.get("tokenizer.chat_template")
        return TextTokenizer(tokenizer, bos, eos, template if isinstance(template, str) else None)
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(
            "The GGUF file's tokenizer is damaged or of a kind that is not read here "
            f"({shown(f'{type(error).__name__}: {error}')})."
        ) from None


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    regex = PRE_TOKENIZERS[name]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    if regex is None:
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), byte_level])
