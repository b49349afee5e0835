"""``command=export``: the last checkpoint of a run -> every format that can hold it -> verified by its consumer."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitnet_train.commands.console import make_console, print_table
from bitnet_train.commands.sources import OpenedRun, open_run
from bitnet_train.config import Config
from bitnet_train.errors import ConfigError, VerificationError
from bitnet_train.export.canonical import CanonicalCheckpoint
from bitnet_train.export.gguf.plan import Container
from bitnet_train.export.gguf.tokenizer_metadata import tokenizer_obstacle
from bitnet_train.export.held_out import HeldOut
from bitnet_train.export.report import VerificationReport
from bitnet_train.export.rules import fitting_formats
from bitnet_train.export.sizes import ExportSize
from bitnet_train.export.writers import FORMATS, Job
from bitnet_train.reporting.model_card import CardFacts, write_card
from bitnet_train.reporting.run_page import write_run_page
from bitnet_train.storage import put_folder

MEGABYTE = 1_000_000
GGUF_FORMATS = {container.value for container in Container}


def run(cfg: Config) -> int:
    """Write and verify; 0, or VerificationError when a consumer does not compute what was trained."""
    console = make_console()
    opened = open_run(cfg)
    spec = opened.canonical.spec
    names, left_out = fitting_formats(cfg.export, cfg.decoder, spec)
    # What only the tokenizer can say is said before anything is written, too.
    gguf = [name for name in names if name in GGUF_FORMATS]
    obstacle = tokenizer_obstacle(opened.tokenizer, cfg.decoder.vocab) if gguf else None
    if obstacle and cfg.export.formats is not None:
        raise ConfigError(f"export.formats: {gguf[0]} cannot hold this model: {obstacle}.")
    if obstacle:
        names = [name for name in names if name not in gguf]
        left_out |= dict.fromkeys(gguf, obstacle)
    for name, reason in left_out.items():
        console.print(f"{name} left out: {reason}", markup=False)
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ConfigError(f"No export format can hold this model: {reasons}.")
    held_out = opened.held_out(cfg)
    folders = []
    for name in names:
        folder = opened.folder.exports / name
        FORMATS[name].write(_job(cfg, opened, opened.canonical), folder)
        folders.append(folder)
        console.print(f"written: {folder} (step {opened.canonical.step})", markup=False)
    _print_sizes(cfg, opened, folders, console)
    verify_all(cfg, opened, held_out, folders, console)
    for folder in folders if cfg.export.to is not None else []:
        url = f"{str(cfg.export.to).rstrip('/')}/{_run_name(cfg, opened)}/{folder.name}"
        put_folder(folder, url, "export.to")
        console.print(f"copied: {url}", markup=False)
    return 0


def _print_sizes(cfg: Config, opened: OpenedRun, folders: list[Path], console: Console) -> None:
    table = Table(title="sizes", title_justify="left")
    for heading in (
        "format",
        "files",
        "tensors",
        "without embeddings",
        "bits per quantised weight",
        "times the ideal 1.58",
    ):
        table.add_column(heading, justify="left" if heading == "format" else "right")
    for folder in folders:
        size = FORMATS[folder.name].size(cfg.decoder, opened.canonical.spec, cfg.export)
        files = sum(path.stat().st_size for path in folder.iterdir())
        numbers = (files, size.total_bytes, size.total_bytes - size.embedding_bytes)
        table.add_row(folder.name, *(f"{n / MEGABYTE:,.2f} MB" for n in numbers), *_bits(size))
    print_table(console, table)


def _bits(size: ExportSize) -> tuple[str, str]:
    return (f"{size.bits_per_code:.3f}", f"{size.over_ideal:.2f}") if size.code_weights else ("-", "-")


def _job(cfg: Config, opened: OpenedRun, canonical: CanonicalCheckpoint) -> Job:
    return Job(canonical, opened.tokenizer, opened.folder.path.resolve().name, cfg.export)


def _run_name(cfg: Config, opened: OpenedRun) -> str:
    return cfg.run_name or opened.folder.path.resolve().name


def _write_card(cfg: Config, opened: OpenedRun, folder: Path, report: VerificationReport, console: Console) -> None:
    spec = opened.canonical.spec
    size = FORMATS[folder.name].size(cfg.decoder, spec, cfg.export)
    try:
        write_card(CardFacts(cfg, _run_name(cfg, opened), opened.folder, cfg.export, size, report, spec), folder)
    except OSError as error:
        console.print(f"The model card of {folder} is not written: {error.strerror}", markup=False)


def _write_page(cfg: Config, opened: OpenedRun, console: Console) -> None:
    """The run's page, which lists its exports."""
    if not opened.folder.metrics_file.is_file():
        return
    try:
        write_run_page(cfg, opened.folder, _run_name(cfg, opened))
    except OSError as error:
        console.print(f"The page of {opened.folder.path} is not written: {error.strerror}", markup=False)


def verify_all(cfg: Config, opened: OpenedRun, held_out: HeldOut, folders: list[Path], console: Console) -> None:
    """Verify each export with its consumer, print the reports; raises VerificationError when any failed."""
    failures = []
    for folder in folders:
        canonical = opened.at_step_of(folder, cfg)
        console.print(f"verifying {folder} with its consumer", markup=False)
        report = FORMATS[folder.name].verify(_job(cfg, opened, canonical), folder, held_out)
        print_table(console, report.table())
        if report.sample:
            console.print(Text(f"generated by {report.consumer}: ").append(repr(report.sample), "dim"))
        console.print(f"verified in {report.seconds:.0f} s")
        _write_card(cfg, opened, folder, report, console)
        try:
            report.raise_if_failed()
        except VerificationError as error:
            failures.append(str(error))
    _write_page(cfg, opened, console)
    if failures:
        raise VerificationError(" ".join(failures))
