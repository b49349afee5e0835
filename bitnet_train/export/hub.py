"""A checkpoint on the Hugging Face hub as a local folder."""

import re
from pathlib import Path

from bitnet_train.errors import ConfigError

# config.json, tokenizer and weights; no pickles, no code.
WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


def looks_like_hub_name(source: str) -> bool:
    """Whether ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` may be meant: two plain words, and no folder of the first's."""
    name = source.partition("@")[0]
    plain = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None
    return plain and not Path(name).parent.is_dir()


def download(source: str, key: str) -> Path:
    """The local copy of a hub repository, downloaded unless it is there already.

    Raises ConfigError, which names the setting ``key``, when it does not exist or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=WANTED))
    except Exception as error:  # of requests, httpx, the hub's own and the file system's
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}{': ' + lines[0][:160].rstrip('.') if lines else ''}"
        raise ConfigError(
            f"{key}={source} is no folder here, and the Hugging Face hub has no such repository that can be reached "
            f"({reason}): download it elsewhere and give its folder."
        ) from None
