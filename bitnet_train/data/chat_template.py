"""From conversations to token ids with a mask of the assistant's: chat templates as transformers renders them.

A template's control tokens become special ids; what the messages say is text, whatever it looks like, so that a message
cannot end its own turn.
"""

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from bitnet_train.data.chat import ASSISTANT, Conversation, Message
from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError

# Around what a template's generation tag encloses, until the text is cut there. (Private characters of Unicode, which
# no conversation holds.)
OPEN, CLOSE = "\U00100000", "\U00100001"
# In a message's text, character FIRST + i stands for special token i until the text is cut at the template's own.
FIRST = 0xF0000
# Characters or items that a template may make by repetition.
LONGEST_REPETITION = 10_000


def check_documents_apart(tokenizer: TextTokenizer) -> None:
    """Raises ConfigError when a conversation's first token also ends its turns (data.attend_within_documents)."""
    token, template = str(tokenizer.tokenizer.id_to_token(tokenizer.bos_id)), tokenizer.chat_template or ""
    if tokenizer.bos_id == tokenizer.eos_id and ("eos_token" in template or token in template):
        raise ConfigError(
            f"data.attend_within_documents=true tells conversations apart by their first token, {token}, which also "
            "ends turns in the chat template: leave it out."
        )


class ChatEncoder:
    """Turns conversations into ids and masks. Raises ConfigError for a template that is no Jinja."""

    def __init__(self, tokenizer: TextTokenizer, template: str) -> None:
        import jinja2

        self.tokenizer = tokenizer
        self.marks_turns = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        try:
            self._template = _environment().from_string(template)
        except jinja2.TemplateError as error:
            raise ConfigError(f"The chat template is no Jinja: {error}.") from None
        added = tokenizer.tokenizer.get_added_tokens_decoder()
        self._specials = {token.content: index for index, token in added.items() if token.special}
        # The longest first: one may begin with another.
        self._names = sorted(self._specials, key=lambda token: (-len(token), token))
        self._cut = re.compile("|".join(map(re.escape, self._names)) or "(?!)")
        self._variables = {
            name: tokenizer.tokenizer.id_to_token(index)
            for name, index in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
        }

    def encode(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Ids, the bos id first, and 1 for each that the assistant has to say, its end-of-turn token included.

        The assistant's tokens are what a ``generation`` tag of the template encloses; without one, what a turn adds to
        the conversation before it with the generation prompt. Ids are cut where a prompt would end. Raises ConfigError,
        naming the conversation's line, when the template refuses it or does not write turn after turn.
        """
        ids, mask = [], []
        for text, learnt in self.segments(conversation):
            new = self._encode(text)
            ids += new
            mask += [int(learnt)] * len(new)
        if not ids or ids[0] != self.tokenizer.bos_id:
            ids, mask = [self.tokenizer.bos_id, *ids], [0, *mask]
        if not any(mask):
            raise ConfigError(f"{conversation.where}: the chat template writes no tokens of the assistant.")
        return ids, mask

    def segments(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """The rendered text, in order, in pieces of which the assistant says all or nothing."""
        messages = [{**m, "content": self._hidden(m["content"])} for m in conversation.messages]
        whole = self._render(messages, conversation.where)
        if self.marks_turns:
            pieces = re.split(f"({OPEN}[^{CLOSE}]*{CLOSE})", whole)
            return [(piece.strip(OPEN + CLOSE), piece.startswith(OPEN)) for piece in pieces if piece]
        found, done = [], 0
        for number, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            prompt = self._render(messages[:number], conversation.where, add_generation_prompt=True)
            turn = self._render(messages[: number + 1], conversation.where)
            if not (turn.startswith(prompt) and whole.startswith(turn) and len(prompt) >= done):
                raise ConfigError(
                    f"{conversation.where}: the chat template writes earlier turns otherwise when others follow, so "
                    "the assistant's part cannot be told apart: enclose it in {% generation %} ... {% endgeneration %}."
                )
            found += [(whole[done : len(prompt)], False), (whole[len(prompt) : len(turn)], True)]
            done = len(turn)
        return [(text, learnt) for text, learnt in [*found, (whole[done:], False)] if text]

    def _render(self, messages: list[Message], where: object, add_generation_prompt: bool = False) -> str:
        import jinja2

        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt,
                **self._variables,
            )  # fmt: skip
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise ConfigError(f"{where}: the chat template refuses the conversation: {error}.") from None

    def _hidden(self, content: str) -> str:
        """``content`` with a private character in the place of each special token that it spells out."""
        return self._cut.sub(lambda match: chr(FIRST + self._names.index(match[0])), content)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in [*self._cut.finditer(text), None]:
            plain = text[start : match.start() if match else len(text)]
            if plain:
                spelt = re.sub("[\U000f0000-\U000fffff]", lambda found: self._names[ord(found[0]) - FIRST], plain)
                ids += self.tokenizer.encode(spelt)
            if match:
                ids.append(self._specials[match[0]])
                start = match.end()
        return ids


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates (``utils/chat_template_utils.py``).

    Without its ``strftime_now``: what a run trains on must not depend on the day its shards are made; templates that
    ask for it have a fixed date of their own.
    """
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Generation(Extension):
        """``{% generation %} ... {% endgeneration %}``."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

        def _enclosed(self, caller: Callable[[], str]) -> str:
            return f"{OPEN}{caller()}{CLOSE}"

    class Sandbox(ImmutableSandboxedEnvironment):
        """Without powers, and without texts and lists repeated to any length: a template could fill the memory."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            for sequence, count in ((left, right), (right, left)):
                repeats = isinstance(sequence, str | list | tuple) and isinstance(count, int)
                if repeats and len(sequence) * count > LONGEST_REPETITION:
                    raise SecurityError("it repeats something too often")
            if operator == "**":
                raise SecurityError("it raises to a power")
            return super().call_binop(context, operator, left, right)

    def to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment
