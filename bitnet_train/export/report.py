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
