"""The outcome of a verification: one row per check, as a table on the terminal and as verification.json."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bitnet_train.errors import VerificationError

REPORT_FILE = "verification.json"


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, what came out, what was allowed."""

    name: str
    measured: str
    tolerance: str
    passed: bool


@dataclass
class VerificationReport:
    """All checks of one export against the run it was made from."""

    format: str
    folder: str
    consumer: str
    step: int
    checks: list[Check] = field(default_factory=list)
    # Text that the consumer generated, prompt included.
    sample: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        """Whether every check passed (and there was one)."""
        return bool(self.checks) and not self.failed

    def add(self, name: str, measured: str, tolerance: str, passed: bool) -> None:
        """Append a row."""
        self.checks.append(Check(name, measured, tolerance, passed))

    def add_token_ids(self, wanted: list[list[int]], found: list[list[int]]) -> None:
        """A row for the ids of held-out texts, text by text."""
        pairs = list(zip(wanted, found, strict=True))
        total, equal = sum(map(len, wanted)), sum(len(ours) for ours, theirs in pairs if ours == theirs)
        self.add("token ids of held-out text", f"{equal:,} of {total:,} equal", "all", equal == total)

    def add_started_ids(self, bos: int, wanted: list[list[int]], started: list[list[int]]) -> None:
        """A row for the ids of texts as a consumer starts them by itself: bos, then the text."""
        with_bos = all(theirs == [bos, *ours] for ours, theirs in zip(wanted, started, strict=True))
        self.add("special tokens added", "bos in front" if with_bos else "others", "bos, as in training", with_bos)

    def add_decoded(self, texts: list[str], back: list[str]) -> None:
        """A row for the way back from ids to text."""
        same = sum(ours == theirs for ours, theirs in zip(texts, back, strict=True))
        self.add("text decoded from ids", f"{same} of {len(texts)} documents equal", "all", same == len(texts))

    def add_chat_template(self, wanted: str | None, found: str | None) -> None:
        """A row for the tokenizer's chat template."""
        same = found == wanted
        self.add("config: tokenizer.chat_template", "equal" if same else "another", "as in the run", same)

    def add_perplexity(
        self, name: str, mine: float, other: float, tokens: int, allowed: float, digits: int, beside: str = ""
    ) -> None:
        """A row for a consumer's perplexity on ``tokens`` tokens; ``digits`` are those of the allowed percentage."""
        difference = abs(other / mine - 1)
        measured = f"{difference:.3%}: {other:.4f} against {mine:.4f} on {tokens:,} tokens{beside}"
        self.add(name, measured, f"{allowed:.{digits}%}", difference <= allowed)

    def guarded(self, name: str, check: Callable[[], None]) -> None:
        """Run ``check``; what it raises is a failed row called ``name``, for that is a consumer's verdict as well."""
        try:
            check()
        except Exception as error:
            text = " ".join(str(error).split()) or "no message"
            shortened = f"{text[:240]}{'...' if len(text) > 240 else ''}"
            self.add(name, f"{type(error).__name__}: {shortened}", "no error", False)

    def save(self, folder: Path) -> None:
        """Write verification.json into ``folder``."""
        content: dict[str, Any] = {"passed": self.passed, **asdict(self)}
        (folder / REPORT_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def raise_if_failed(self) -> None:
        """Raises VerificationError naming the failed checks."""
        if self.passed:
            return
        shown = "; ".join(f"{check.name} ({check.measured}, allowed {check.tolerance})" for check in self.failed[:4])
        more = f"; and {len(self.failed) - 4} more in {REPORT_FILE}" if len(self.failed) > 4 else ""
        raise VerificationError(f"The export {self.folder} failed its verification in {self.consumer}: {shown}{more}.")

    def table(self) -> Table:
        """The checks, with the configuration fields that passed in one row."""
        title = Text(f"{self.format} against step {self.step} of the run, in {self.consumer}")
        table = Table(title=title, title_justify="left")
        for heading in ("check", "measured", "allowed", ""):
            table.add_column(heading, overflow="fold")
        good = [check for check in self.checks if check.passed and check.name.startswith("config: ")]
        if good:
            table.add_row("config", f"{len(good)} fields equal", "equal", Text("ok", "green"))
        for check in self.checks:
            if check not in good:
                mark = Text("ok", "green") if check.passed else Text("FAILED", "bold red")
                table.add_row(Text(check.name), Text(check.measured), Text(check.tolerance), mark)
        return table
