"""Conversations: read from files in the format of transformers' chats (``data.chat_template`` makes tokens of them)."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bitnet_train.data.config import ChatCorpus
from bitnet_train.data.document import Document, find_files, held_out, stamp
from bitnet_train.data.parquet import read_rows
from bitnet_train.data.units import Line, Span, Unit, lines_of, named, spans
from bitnet_train.errors import ConfigError

Message = dict[str, Any]
# What data.chat_template uses for its own ends.
PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
SURROGATE = re.compile("[\ud800-\udfff]")
ASSISTANT = "assistant"


@dataclass(frozen=True)
class Conversation(Document):
    """Messages with ``role`` and ``content``; ``text`` is their contents; ``where`` names file and line."""

    messages: tuple[Message, ...]
    where: str | Line


class ChatSource:
    """Conversations in jsonl (also .gz) and parquet files, one per line or row."""

    def __init__(self, cfg: ChatCorpus) -> None:
        if not cfg.path:
            raise ConfigError(
                "data.corpus.path is not set: give a jsonl or parquet file of conversations, or a folder."
            )
        self.cfg = cfg
        key = "data.corpus.validation_path"
        self.validation_files = find_files(cfg.validation_path, cfg.patterns, key) if cfg.validation_path else None
        held = {path.resolve() for path in self.validation_files or []}
        found = find_files(cfg.path, cfg.patterns, "data.corpus.path")
        self.files = [path for path in found if path.resolve() not in held]
        self.template = _read_template(cfg.template) if cfg.template else None

    def documents(self) -> Iterator[Conversation]:
        for index, conversation in enumerate(self._conversations([Span(path) for path in self.files])):
            yield replace(
                conversation,
                validation=self.validation_files is None and held_out(index, self.cfg.validation_every),
            )
        for conversation in self._conversations([Span(path) for path in self.validation_files or []]):
            yield replace(conversation, validation=True)

    def units(self, limit: int) -> list[Unit]:
        """Shares of about ``limit`` bytes (:mod:`bitnet_train.data.units`)."""

        def conversations(share: list[Span], validation: bool) -> Iterator[Document]:
            return (replace(conversation, validation=validation) for conversation in self._conversations(share))

        every = self.cfg.validation_every if self.validation_files is None else None
        held = spans(self.validation_files or [], limit)
        return [
            *(Unit(named(share), partial(conversations, share, False), every) for share in spans(self.files, limit)),
            *(Unit(named(share), partial(conversations, share, True)) for share in held),
        ]

    def identity(self) -> dict[str, str]:
        template = {} if self.template is None else {"template": hashlib.sha256(self.template.encode()).hexdigest()}
        return {"files": stamp([*self.files, *(self.validation_files or [])]), **template}

    def _conversations(self, parts: list[Span]) -> Iterator[Conversation]:
        for span in parts:
            rows = self._parquet(span) if span.path.suffix == ".parquet" else self._jsonl(span)
            for where, messages in rows:
                yield self._checked(where, messages)

    def _parquet(self, span: Span) -> Iterator[tuple[str, object]]:
        field = self.cfg.messages_field
        for number, row in read_rows(span.path, [field], (span.start, span.stop)):
            messages = row[field]
            if isinstance(messages, list):
                # A table has every column in every row.
                messages = [
                    {k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in messages
                ]
            yield f"{span.path} row {number}", messages

    def _jsonl(self, span: Span) -> Iterator[tuple[str | Line, object]]:
        path = span.path
        opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
        where = Line(path, 0, 0)
        try:
            with opener(path, "rb") as stream:
                for where, line in lines_of(span, stream):
                    if line.strip():
                        record = json.loads(line.decode("utf-8"))
                        yield (
                            where if where.number is None else str(where),
                            record.get(self.cfg.messages_field) if isinstance(record, dict) else None,
                        )
        except ValueError as error:  # JSON, UTF-8
            raise ConfigError(f"{where} is no JSON: {str(error).splitlines()[0]}.") from None
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"{path} cannot be read: {error}.") from None

    def _checked(self, where: str | Line, messages: object) -> Conversation:
        if not isinstance(messages, list) or not messages:
            raise ConfigError(
                f"{where} has no list of messages in '{self.cfg.messages_field}' (data.corpus.messages_field)."
            )
        for message in messages:
            fine = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            if not fine:
                raise ConfigError(f"{where}: every message needs a role and a content, both text.")
            if SURROGATE.search(message["content"]) or PRIVATE.search(message["content"]):
                raise ConfigError(
                    f"{where} holds half of a surrogate pair or a character of a private plane (U+F0000 on)."
                )
        if not any(message["role"] == ASSISTANT and message["content"].strip() for message in messages):
            raise ConfigError(f"{where} has no turn of the assistant, so there is nothing to learn: leave it out.")
        return Conversation("\n".join(m["content"] for m in messages), False, tuple(messages), where)


def _read_template(given: str) -> str:
    """A template's text, or that of the file it names."""
    if "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(
            f"data.corpus.template={given} is neither Jinja nor a file that can be read: {reason}."
        ) from None
