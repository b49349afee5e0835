"""Keys and tokens stay in the environment: recognised, so that none gets into a file, a log or a message."""

import os
import re
from collections.abc import Iterable
from typing import Any

MASK = "***"
# Variables whose values are secrets.
_NAMES = re.compile(
    r"(^|_)(API_?KEY|ACCESS_?KEY|TOKENS?|SECRETS?|PASSWD|CREDENTIALS?|CONNECTION_STRING)(_ID)?$|PASSWORD$",
    re.IGNORECASE,
)
# Variables whose values are, unless they are paths, words or numbers.
_PERHAPS = re.compile(r"_(KEY|PASS)$", re.IGNORECASE)
# Shorter values would be found everywhere.
_SHORTEST = 8
# What is a secret wherever it stands: Hugging Face, OpenAI and the like, GitHub, GitLab, AWS, Google, Slack, W&B's new
# keys, JSON web tokens, private keys, a signed URL's signature, and the password in a URL.
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bapi_org_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bwandb_v\d_\w{20,}"
    r"|\bglpat-[\w-]{16,}|\bAIza[\w-]{30,}|\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|(?<=[?&]sig=)[^&\s\"']{16,}|(?<=X-Amz-Signature=)\w{16,}"
    r"|(?<=://)[^/\s:@]+:(?!\d+/)[^\s@]+(?=@)|(?<=://)[^/\s:@]{16,}(?=@)"
)
# What is one because of the name before it: token=..., api_key: ..., --password ...
_NAMED = re.compile(
    r"(?i)\b((?:[\w.-]*[_.-])?(?:api_?key|access_?key|token|secret|password|passwd))((?:\"|')?\s*[=:]\s*(?:\"|')?)"
    r"([^\s\"',;&}\]]{8,})"
)


def _known() -> list[str]:
    """The secrets in the environment, the longest first."""
    found = {
        v
        for k, v in os.environ.items()
        if len(v) >= _SHORTEST and ((_NAMES.search(k) and not v.isdigit()) or (_PERHAPS.search(k) and not _harmless(v)))
    }
    return sorted(found, key=lambda value: (-len(value), value))


def masked(text: str) -> str:
    """``text`` with ``***`` in the place of everything that is or looks like a key, a token or a password."""
    for secret in _known():
        text = text.replace(secret, MASK)
    text = _SHAPES.sub(MASK, text)
    return _NAMED.sub(lambda found: found[0] if _harmless(found[3]) else f"{found[1]}{found[2]}{MASK}", text)


def masked_all(values: Iterable[Any]) -> list[str]:
    """Each of ``values``, such as a command line, masked."""
    return [masked(str(value)) for value in values]


def is_secret(value: str) -> bool:
    """Whether ``value`` holds a secret of the environment, or what is one by its shape or by the name before it."""
    return masked(value) != value


def _harmless(value: str) -> bool:
    """Special tokens, numbers and names of other things that are called tokens."""
    return not re.search(r"\d", value) or not re.search(r"[A-Za-z]", value) or value.startswith(("<", "[", "{", "/"))
