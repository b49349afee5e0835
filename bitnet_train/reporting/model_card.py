"""The model card of an export: README.md with the training facts, how to run it, its sizes and what was verified."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitnet_train.data.describe import describe
from bitnet_train.errors import ConfigError
from bitnet_train.export.config import ExportConfig
from bitnet_train.export.report import Check, VerificationReport
from bitnet_train.export.sizes import ExportSize
from bitnet_train.nn.config import initial_source
from bitnet_train.quant.spec import QuantSpec, build_spec
from bitnet_train.reporting.charts import Chart, Line, png, smoothed
from bitnet_train.reporting.metrics import Metrics, read_metrics
from bitnet_train.reporting.page import megabytes, number
from bitnet_train.reporting.run_facts import audit_rows, read_json_object
from bitnet_train.training.config import RunConfig
from bitnet_train.training.losses.config import DistillationLoss
from bitnet_train.training.regularisers.config import NoRegulariser
from bitnet_train.training.run_folder import RunFolder

CARD, CURVE = "README.md", "curve.png"

# How each format is run, NAME being the folder or file.
USAGE = {
    "hf-packed": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("NAME", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("NAME")
print(tokenizer.decode(model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=64)[0]))
```

The weights are ternary codes, four to a byte; `accelerate` must be installed.""",
    "hf-master": """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("NAME", dtype="auto")  # ready for a Trainer
```

The weights are the master weights. transformers ternarises them in every forward pass (`quantization_mode: online`), so
training can go on. For inference take the packed export.""",
    "hf-dense": """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("NAME", dtype="auto")
```

The weights are codes times scales, for tools that know nothing of ternary weights. Activations are not quantised there,
so outputs differ slightly from the other formats.""",
    "packed": """```
python -m bitnet_train command=generate run=NAME
```

bitnet_train's own format: a safetensors file with the codes of every quantised layer, which its documentation
describes byte by byte (docs/packed_format.md).""",
    "gguf-tq2_0": """```
llama-cli -m NAME/FILE -p "def "
```

For llama.cpp's main line.""",
    "gguf-i2_s": """```
python run_inference.py -m NAME/FILE -p "def "
```

For bitnet.cpp (microsoft/BitNet); llama.cpp's main line does not read this type.""",
}
# Dense weights of a run without quantisation.
FLOAT_USAGE = USAGE["hf-dense"].split("\n\nThe weights are")[0]
USAGE["gguf-tq1_0"] = USAGE["gguf-tq2_0"]


@dataclass(frozen=True)
class CardFacts:
    """What the card is about: the run, the export, and how it did."""

    cfg: RunConfig
    name: str
    run: RunFolder
    export: ExportConfig
    size: ExportSize
    report: VerificationReport
    # Of the step that was exported, where the run changes it on the way.
    spec: QuantSpec | None = None

    @property
    def quantisation(self) -> QuantSpec:
        """What is quantised how in the export."""
        return self.spec or build_spec(self.cfg.quant)


def write_card(facts: CardFacts, folder: Path) -> None:
    """Write README.md and curve.png into the export's folder. Raises OSError when it cannot be written."""
    try:
        # The run may have gone on since.
        metrics = read_metrics(facts.run.metrics_file).until(facts.report.step)
    except ConfigError:
        metrics = Metrics({})
    chart = _curve(metrics)
    if not chart.empty:
        png(chart, folder / CURVE)
    (folder / CARD).write_text(card(facts, folder, metrics, not chart.empty), encoding="utf-8")


def card(facts: CardFacts, folder: Path, metrics: Metrics, curve: bool) -> str:
    """The text of the card."""
    cfg, report = facts.cfg, facts.report
    rows = audit_rows(cfg.decoder, facts.quantisation)
    total = sum(row.parameters for row in rows)
    quantised = sum(row.share for row in rows if row.kept != "float")
    file = next((path.name for path in sorted(folder.glob("*.gguf"))), "")
    head = ["---", *([f"license: {facts.export.license}"] if facts.export.license else [])]
    head += ["library_name: transformers"] if report.format.startswith("hf-") else []
    tags = ["bitnet", "ternary", "1.58-bit"] if _kept(facts) == "ternary" else [_kept(facts)] if quantised else []
    head += ["pipeline_tag: text-generation", *(["tags:"] if tags else []), *(f"- {tag}" for tag in tags), "---", ""]
    usage = USAGE[report.format] if quantised or report.format != "hf-dense" else FLOAT_USAGE
    usage = usage.replace("NAME", folder.name).replace("FILE", file)
    source = initial_source(cfg.init)
    start = "trained from scratch" if source is None else f"started from {source} and trained"
    what = f", {quantised:.1%} of them {_kept(facts)}" if quantised else ""
    lines = [
        *head,
        f"# {facts.name}, {report.format}",
        "",
        f"A language model of {total:,} parameters{what}, {start} with bitnet_train. This folder is step "
        f"{report.step:,} of the run.",
        "",
        "## Use",
        "",
        usage,
        "",
        "## Training",
        "",
        *_table(("", ""), _training(facts, metrics)),
        "",
        *([f"![loss and bits per byte over the run]({CURVE})", ""] if curve else []),
        "## Size",
        "",
        *_table(("", ""), _size(facts)),
        "",
        "## Verification",
        "",
        f"Reloaded with {report.consumer} and compared with the run: {'passed' if report.passed else '**FAILED**'}.",
        "",
        *_table(
            ("check", "measured", "allowed", ""),
            [(c.name, c.measured, c.tolerance, "ok" if c.passed else "FAILED") for c in _shown(report)],
        ),
        "",
    ]
    return "\n".join(lines)


def _kept(facts: CardFacts) -> str:
    schemes = sorted({row.kept.split(",")[0] for row in audit_rows(facts.cfg.decoder, facts.quantisation)})
    return " or ".join(scheme for scheme in schemes if scheme != "float") or "quantised"


def _shown(report: VerificationReport) -> list[Check]:
    return [c for c in report.checks if not (c.passed and c.name.startswith("config: "))]


def _training(facts: CardFacts, metrics: Metrics) -> list[tuple[str, str]]:
    cfg, model = facts.cfg, facts.cfg.decoder
    sessions = (read_json_object(facts.run.provenance_file, "sessions") or {"sessions": []})["sessions"]
    last = sessions[-1] if sessions else {}
    git, versions = last.get("git") or {}, last.get("versions", {})
    hardware = last.get("hardware", {})
    tokens = f"{'up to ' if cfg.trainer.batch_warmup else ''}{cfg.trainer.batch_tokens:,}"
    return [
        ("data", f"{describe(cfg.text, cfg.trainer.max_steps)}, sequences of {cfg.text.sequence_length} tokens"),
        ("steps", f"{facts.report.step:,} of {cfg.trainer.max_steps:,}, {tokens} tokens each"),
        ("optimizer", f"{cfg.optimizer.name}, peak learning rate {cfg.optimizer.lr:g}, schedule {cfg.schedule.name}"),
        *_objective(cfg),
        ("bits per byte of held-out text", number(metrics.last("val/bits_per_byte"))),
        ("held-out loss", number(metrics.last("val/loss"))),
        ("model", f"{model.layers} layers, hidden {model.hidden}, {model.heads} heads "
                  f"({model.kv_heads} for keys and values), FFN {model.ffn}, context {model.context}, "
                  f"{model.activation.value}, vocabulary {model.vocab}"),
        ("hardware", ", ".join(hardware.get("gpus") or []) or str(hardware.get("cpu", "-"))),
        ("software", f"bitnet_train {versions.get('bitnet_train', '-')} ({git.get('commit', 'a release')[:12]}), "
                     f"torch {versions.get('torch', '-')}"),
    ]  # fmt: skip


def _objective(cfg: RunConfig) -> list[tuple[str, str]]:
    """What was minimised, where it was more than the cross-entropy."""
    loss, regulariser = cfg.loss, cfg.regulariser
    taught = f"distilled from {loss.teacher}" if isinstance(loss, DistillationLoss) else ""
    penalty = "" if isinstance(regulariser, NoRegulariser) else f"regulariser {regulariser.name}"
    more = [part for part in (taught, penalty) if part]
    return [("loss", ", ".join(["cross-entropy", *more]))] if more else []


def _size(facts: CardFacts) -> list[tuple[str, str]]:
    size = facts.size
    rows = [
        ("all tensors", megabytes(size.total_bytes)),
        ("embedding and head", megabytes(size.embedding_bytes)),
    ]
    if size.code_weights:
        rows.append(("quantised layers", megabytes(size.code_bytes)))
        rows.append(("bits per quantised weight", f"{size.bits_per_code:.3f} (ideal: 1.585)"))
    return rows


def _curve(metrics: Metrics) -> Chart:
    steps, losses = metrics.series("train/loss")
    lines = [
        Line("training loss (smoothed)", steps, smoothed(losses, max(1, len(losses) // 25))),
        Line("held-out loss", *metrics.series("val/loss")),
        Line("held-out bits per byte", *metrics.series("val/bits_per_byte")),
    ]
    return Chart("Loss (nats per token) and bits per byte", [line for line in lines if line.steps])


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    clean = lambda cell: cell.replace("|", "\\|").replace("\n", " ")  # noqa: E731
    lines = [f"| {' | '.join(headings)} |", f"| {' | '.join('---' for _ in headings)} |"]
    return lines + [f"| {' | '.join(clean(cell) for cell in row)} |" for row in rows]
