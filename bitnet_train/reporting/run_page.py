"""The page of one run: curves, samples, audit, exports, configuration."""

from pathlib import Path
from typing import Any

from bitnet_train.quant.spec import build_spec
from bitnet_train.reporting.layer_charts import layer_charts
from bitnet_train.reporting.metrics import Metrics, read_metrics
from bitnet_train.reporting.page import megabytes, number, render
from bitnet_train.reporting.run_facts import (
    audit_rows,
    export_facts,
    last_evaluation,
    last_samples,
    read_json_object,
    run_charts,
)
from bitnet_train.training.config import RunConfig, step_size
from bitnet_train.training.run_folder import RunFolder

REPORT_FILE = "report.html"


def run_page(cfg: RunConfig, folder: RunFolder, name: str) -> str:
    """The page of the run in ``folder`` as HTML. Raises ConfigError when it has no metrics."""
    metrics = read_metrics(folder.metrics_file)
    rows = audit_rows(cfg.model, build_spec(cfg.quant))
    size = step_size(cfg)
    step, samples = last_samples(folder.samples_file)
    quantised = sum(row.share for row in rows if row.kept != "float")
    total = sum(row.parameters for row in rows)
    subtitle = (
        f"{total:,} parameters, {quantised:.1%} of them quantised; {cfg.trainer.max_steps:,} steps of "
        f"{'up to ' if cfg.trainer.batch_warmup else ''}{size.count:,} {size.unit}."
    )
    return render(
        name,
        subtitle,
        str(folder.path),
        run_figures(metrics, read_json_object(folder.path / "evaluation.json", "test")),
        run_charts(metrics) + layer_charts(folder.layers_file),
        exports=[
            (
                export.name,
                megabytes(export.bytes),
                export.verdict,
                (export.verification or {}).get("consumer", "-"),
                export.measured("codes", "codes made by the consumer", "codes times scales"),
                export.measured("held-out perplexity", "perplexity of what was read"),
            )
            for export in export_facts(folder.exports)
        ],
        tasks=_tasks(folder),
        samples=samples,
        samples_step=step,
        audit=[(r.what, f"{r.matrices:,}", f"{r.parameters:,}", f"{r.share:.1%}", r.kept) for r in rows],
        sessions=_sessions(folder),
        config=folder.config_file.read_text(encoding="utf-8") if folder.config_file.is_file() else "",
    )


def run_figures(metrics: Metrics, evaluated: dict[str, Any] | None = None) -> list[tuple[str, str]]:
    """The few figures at the top of a page or a card; ``evaluated`` is what a classifier's test images gave."""
    last_step = max((series[0][-1] for series in metrics.columns.values() if series[0]), default=0)
    unit = "images" if metrics.series("images")[0] else "tokens"
    held_out = "images" if unit == "images" else "text"
    speeds = sorted(metrics.series(f"{unit}_per_second")[1])
    figures = [
        ("bits per byte of held-out text", number(metrics.last("val/bits_per_byte"))),
        (f"loss on held-out {held_out}", number(metrics.last("val/loss"))),
        ("optimizer steps", f"{last_step:,}"),
        (f"{unit} seen", number(metrics.last(unit), 0)),
        (f"{unit} per second (median)", number(speeds[len(speeds) // 2] if speeds else None, 0)),
        ("minutes of training", number((metrics.last("elapsed_seconds") or 0) / 60, 1)),
    ]
    if unit == "images":
        accuracy = metrics.last("val/accuracy")
        figures[0] = ("accuracy on held-out images", "-" if accuracy is None else f"{accuracy:.2%}")
        if evaluated is not None:
            figures.insert(0, ("accuracy on test images", f"{evaluated['test']['accuracy']:.2%}"))
    zeros = metrics.last("codes/zeros")
    return figures if zeros is None else [*figures, ("codes that are zero", f"{zeros:.1%}")]


def _tasks(folder: RunFolder) -> list[tuple[str, str, str, str]]:
    files = [("the run", folder.path / "evaluation.json")]
    files += [
        (export.name, folder.exports / export.name / "evaluation.json") for export in export_facts(folder.exports)
    ]
    found_scores = [(where, (read_json_object(path) or {}).get("tasks") or {}) for where, path in files]
    found_scores.append(last_evaluation(folder.evaluations_file))
    rows = []
    for where, scores in found_scores:
        for task, found in scores.items():
            for key, value in found.items():
                metric = key.partition(",")[0]
                if not metric.endswith("_stderr") and metric != "sample_len":
                    rows.append((where, task, metric, number(value)))
    return rows


def _sessions(folder: RunFolder) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    content: dict[str, Any] = read_json_object(folder.provenance_file, "sessions") or {"sessions": []}
    for session in content["sessions"]:
        git, versions = session.get("git") or {}, session.get("versions", {})
        commit = git.get("commit", "-")[:12] + (" (edited)" if git.get("dirty") else "")
        hardware = session.get("hardware", {})
        device = ", ".join(hardware.get("gpus") or []) or f"{hardware.get('cpu')}, {hardware.get('threads')} threads"
        command = " ".join(["bitnet_train", *session.get("command", [])[1:]])
        version, torch_version = versions.get("bitnet_train", "-"), versions.get("torch", "-")
        rows.append((session.get("started", "-"), commit, version, torch_version, device, command))
    return rows


def write_run_page(cfg: RunConfig, folder: RunFolder, name: str) -> Path:
    """Write report.html into the run's folder; returns its path. Raises ConfigError when the run has no metrics."""
    path = folder.path / REPORT_FILE
    path.write_text(run_page(cfg, folder, name), encoding="utf-8")
    return path
