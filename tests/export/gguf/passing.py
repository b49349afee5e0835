"""What a verification of a GGUF file has to say."""

import json

from bitnet_train.export.report import VerificationReport
from tests.export.conftest import Export

# Checks of readers, and those that llama.cpp answers.
READ_CHECKS = {
    "codes",
    "scales",
    "types of tensors",
    "unquantised tensors",
    "perplexity of what was read",
    "config: model",
}
RUN_CHECKS = {
    "token ids of held-out text", "special tokens added", "text decoded from ids", "held-out perplexity",
    "text generated",
}  # fmt: skip


def passes(export: Export, checks: set[str]) -> VerificationReport:
    """The verification passes, has made ``checks``, and has saved what it found."""
    report = export.verify()
    assert not report.failed
    assert {check.name for check in report.checks} >= checks
    saved = json.loads((export.folder / "verification.json").read_text())
    assert saved["passed"] is True
    assert saved["format"] == export.format_name
    return report
