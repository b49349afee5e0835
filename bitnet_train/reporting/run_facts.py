"""What a run's folder says about the run, gathered for pages and cards."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_train.nn.config import ModelConfig
from bitnet_train.nn.layout import Role, parameter_table
from bitnet_train.quant.spec import QuantSpec
from bitnet_train.reporting.charts import Chart, Line, smoothed
from bitnet_train.reporting.metrics import Metrics
from bitnet_train.training.callbacks.samples import HEADING


@dataclass(frozen=True)
class AuditRow:
    """Parameters of one kind that are kept in one way."""

    what: str
    matrices: int
    parameters: int
    share: float
    kept: str


def audit_rows(cfg: ModelConfig, spec: QuantSpec) -> list[AuditRow]:
    """What is quantised and what is not, by kind of parameter."""
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    table = parameter_table(cfg)
    for parameter in table:
        kept = "float"
        if parameter.role is Role.linear:
            layer = spec.for_layer(parameter.layer_name)
            if layer.quantised:
                inputs = f"{layer.activation_bits}-bit" if layer.activation_bits else "float"
                groups = layer.group_count(parameter.shape[0])
                kept = f"{layer.scheme}, {groups} scale{'' if groups == 1 else 's'}, {inputs} inputs"
        what = {Role.linear: parameter.layer_name.rpartition(".")[2]}.get(parameter.role, parameter.role.value)
        counts[what, kept] += 1
        sizes[what, kept] += parameter.size
    total = sum(sizes.values())
    return [AuditRow(what, counts[what, kept], size, size / total, kept) for (what, kept), size in sizes.items()]


def run_charts(metrics: Metrics) -> list[Chart]:
    """The curves of a run; those without any value are left out."""
    steps, losses = metrics.series("train/loss")
    span = max(1, len(losses) // 25)
    loss = [Line("training (each logged step)", steps, losses, faint=True)]
    loss.append(Line("training (smoothed)", steps, smoothed(losses, span)))
    on_images = bool(metrics.series("images")[0])
    held_out, unit = ("held-out images", "image") if on_images else ("held-out text", "token")
    loss.append(Line(held_out, *metrics.series("val/loss")))
    parts = [Line(name, *metrics.series(f"loss/{name}")) for name in ("total", "z", "distillation", "regulariser")]
    norm = [Line("gradient norm", *metrics.series("grad_norm")), Line("threshold", *metrics.series("clip_threshold"))]
    norm.append(Line("after clipping", *metrics.series("grad_norm_clipped"), faint=True))
    charts = [
        Chart(f"Loss (nats per {unit})", [line for line in loss if line.steps]),
        Chart("Parts of the loss beside the cross-entropy, and all of it", [line for line in parts if line.steps]),
        Chart("Bits per byte of held-out text", [Line("held-out text", *metrics.series("val/bits_per_byte"))]),
        Chart("Accuracy on held-out images", [Line("held-out images", *metrics.series("val/accuracy"))]),
        Chart("Learning rate", [Line("lr", *metrics.series("lr"))]),
        Chart("Weight decay", [Line("weight decay", *metrics.series("weight_decay"))]),
        Chart("Gradient norm before and after clipping", [line for line in norm if line.steps], logarithmic=True),
        Chart("Steps skipped by the guard", [Line("skipped", *metrics.series("skipped"))]),
        Chart("Tokens per second", [Line("tokens/s", *metrics.series("tokens_per_second"))]),
        Chart("Images per second", [Line("images/s", *metrics.series("images_per_second"))]),
        Chart("Share of codes that are zero", [Line("zeros", *metrics.series("codes/zeros"))]),
        Chart("Share of codes that flip in a step", [Line("flips", *metrics.series("codes/flips"))], logarithmic=True),
        Chart("Share of the device's peak FLOP/s", [Line("share", *metrics.series("model_flops_share"))]),
    ]
    return [chart for chart in charts if not chart.empty]


def last_samples(path: Path) -> tuple[int, list[str]]:
    """The step of the last section of samples.md, and its texts; (0, []) when there are none."""
    if not path.is_file():
        return 0, []
    text = path.read_text(encoding="utf-8", errors="replace")
    headings = list(re.finditer(rf"^{HEADING}(\d+)\n\n````text$", text, flags=re.MULTILINE))
    if not headings:
        return 0, []
    section = text[headings[-1].end() - len("````text") :]
    texts = re.findall(r"^````text\n(.*?)\n````$", section, flags=re.MULTILINE | re.DOTALL)
    return int(headings[-1][1]), texts


def last_evaluation(path: Path) -> tuple[str, dict[str, Any]]:
    """Where and with which scores the tasks were last run on the way; no scores when they were not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        return f"step {content['step']}", dict(content["results"])
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return "", {}


@dataclass(frozen=True)
class ExportFacts:
    """An export of the run: format, size of its files, and its verification if there is one."""

    name: str
    bytes: int
    verification: dict[str, Any] | None

    @property
    def verdict(self) -> str:
        """Verified, failed, or neither."""
        if self.verification is None:
            return "not verified"
        failed = [check["name"] for check in self.verification["checks"] if not check["passed"]]
        return "verified" if not failed else f"FAILED: {', '.join(failed[:3])}"

    def measured(self, *names: str) -> str:
        """What the first check with one of ``names`` measured."""
        checks = self.verification["checks"] if self.verification else []
        return next((check["measured"] for name in names for check in checks if check["name"] == name), "-")


def export_facts(folder: Path) -> list[ExportFacts]:
    """The exports in a run's export folder, by name."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(".") or not path.is_dir():
            continue
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        found.append(ExportFacts(path.name, size, read_json_object(path / "verification.json", "checks")))
    return found


def read_json_object(path: Path, *keys: str) -> dict[str, Any] | None:
    """The object in a JSON file, or None when it is missing, damaged or lacks one of ``keys``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and all(key in content for key in keys) else None
