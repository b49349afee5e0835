"""From token ids, one by one, to text that can be shown as it is made."""

from bitnet_train.data.tokenizer import TextTokenizer

# What bytes that are no character decode to.
REPLACEMENT = "�"


class TextStream:
    """Collects ids and gives out text, holding back what is not yet a character or may become a stop string."""

    def __init__(self, tokenizer: TextTokenizer, stop: tuple[str, ...] = ()) -> None:
        if not all(stop):
            raise ValueError("a stop string is empty")
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._ids: list[int] = []
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is certain with one more id; may be empty. After a stop string there is none."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self.tokenizer.decode(self._ids)
        if text.endswith(REPLACEMENT):
            return ""
        self._ids = []
        return self._release(text, final=False)

    def end(self) -> str:
        """What is still held back, when no more ids come."""
        text = self.tokenizer.decode(self._ids) if self._ids and not self.stopped else ""
        self._ids = []
        return "" if self.stopped else self._release(text, final=True)

    def _release(self, text: str, final: bool) -> str:
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
