"""A week-long run in miniature: 2,000 steps of a tiny model with everything that a long run does on the way.

    nice -n 10 python benchmarks/endurance.py      # some minutes; writes benchmarks/results/DATE-endurance.md

Validation, samples, checkpoints with pruning, layer telemetry and the page at the end; every 100 steps the run's
resident memory, open files and folder size are read from outside, and a line is fitted through the memory.
"""

import argparse
import csv
import datetime
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SETTINGS = (
    "+recipe=micro", "model.hidden=64", "model.layers=2", "model.heads=2", "model.kv_heads=2", "model.ffn=128",
    "data.tokenizer.vocab_size=512", "data.sequence_length=64", "data.workers=1", "trainer.batch_tokens=512",
    "trainer.compile=false", "trainer.log_every=10", "trainer.validate_every=100", "data.validation_tokens=4096",
    "checkpoint.every_steps=100", "checkpoint.keep=3", "samples.every_steps=100", "samples.max_new_tokens=16",
    "telemetry.every_steps=50", "run_name=endurance",
)  # fmt: skip
# Steps after which caches of allocator, autograd and libraries are filled.
WARM = 0.25


@dataclass(frozen=True)
class Sample:
    """The state of the run at a step: bytes in memory, open files by kind, bytes of the folder and its checkpoints."""

    step: int
    resident: int
    files: dict[str, int]
    folder: int
    checkpoints: int

    @property
    def open_files(self) -> int:
        """Descriptors of any kind."""
        return sum(self.files.values())


def endure(steps: int, every: int, folder: Path, *more: str) -> tuple[list[Sample], float]:
    """Train ``steps`` steps and look every ``every`` steps; the samples and the seconds. Raises RuntimeError."""
    command = [
        sys.executable, "-m", "bitnet_train", *SETTINGS, f"trainer.max_steps={steps}", f"paths.runs={folder}/runs",
        f"paths.data={folder}/data", *more,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    samples: list[Sample] = []
    run = folder / "runs" / "endurance"
    begin = time.monotonic()
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        while process.poll() is None:
            step = _last_step(run / "metrics.csv")
            if step // every > (samples[-1].step // every if samples else 0):
                found = look(process.pid, step, run)
                if found is not None:
                    samples.append(found)
            time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}:\n{(folder / 'output.txt').read_text()[-3000:]}")
    return samples, time.monotonic() - begin


def look(pid: int, step: int, run: Path) -> Sample | None:
    """The state of the process now; None when it has just ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        files: dict[str, int] = {}
        for link in Path(f"/proc/{pid}/fd").iterdir():
            kind = _kind(link)
            if kind is not None:
                files[kind] = files.get(kind, 0) + 1
    except (OSError, IndexError):
        return None
    sizes = {path: _size(path) for path in run.rglob("*")}
    checkpoints = sum(path.name.startswith("step-") and path.suffix == ".ckpt" for path in sizes)
    return Sample(step, pages * os.sysconf("SC_PAGE_SIZE"), files, sum(sizes.values()), checkpoints)


def _kind(link: Path) -> str | None:
    try:
        target = str(link.readlink())
    except OSError:  # closed meanwhile
        return None
    return target.partition(":")[0] if ":[" in target or target.startswith("anon_inode") else "file"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() and not path.is_symlink() else 0
    except OSError:
        return 0


def _last_step(metrics: Path) -> int:
    try:
        with metrics.open(newline="") as stream:
            return max((int(row["step"]) for row in csv.DictReader(stream) if row.get("step")), default=0)
    except (OSError, ValueError):
        return 0


def slope(samples: list[Sample]) -> float:
    """Bytes per step by which memory grows, least squares through what comes after the warm-up."""
    warm = [sample for sample in samples if sample.step >= WARM * samples[-1].step]
    mean_step = sum(sample.step for sample in warm) / len(warm)
    mean_size = sum(sample.resident for sample in warm) / len(warm)
    spread = sum((sample.step - mean_step) ** 2 for sample in warm)
    return sum((s.step - mean_step) * (s.resident - mean_size) for s in warm) / spread if spread else 0.0


def page(samples: list[Sample], seconds: float, steps: int) -> str:
    """The results as Markdown."""
    kinds = sorted({kind for sample in samples for kind in sample.files})
    rows = [
        f"| {s.step:,} | {s.resident / 1e6:.1f} | {s.open_files} | {', '.join(f'{s.files.get(k, 0)}' for k in kinds)} "
        f"| {s.folder / 1e6:.2f} | {s.checkpoints} |"
        for s in samples
    ]  # fmt: skip
    return "\n".join(
        [
            f"# {steps:,} steps: memory, open files, folder",
            "",
            f"`python benchmarks/endurance.py --steps {steps}` on {platform.processor() or platform.machine()}, "
            f"{os.cpu_count()} cores shared with other work, Python {platform.python_version()}; {seconds:.0f} s. Read "
            "from outside, from /proc, at the first look after each hundred steps.",
            "",
            f"Memory grows by **{1000 * slope(samples) / 1e6:.2f} MB per 1,000 steps** after the first "
            f"{WARM:.0%} (least squares).",
            "",
            f"| step | resident, MB | open files | of these {', '.join(kinds)} | folder, MB | checkpoints |",
            "| ---: | ---: | ---: | --- | ---: | ---: |",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("endurance"), help="where the run is kept; must not exist")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    samples, seconds = endure(arguments.steps, 100, arguments.folder.resolve())
    text = page(samples, seconds, arguments.steps)
    target = REPOSITORY / "benchmarks" / "results" / f"{datetime.date.today()}-endurance.md"
    target.write_text(text)
    print(text, target)


if __name__ == "__main__":
    main()
