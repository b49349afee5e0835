"""How long a step waits for its checkpoint: written by the step itself (DDP, one file), and in the background from a
copy (FSDP2, a folder of shards). Two processes on the CPU, each with one thread.

    python benchmarks/checkpoint_stall.py [--recipe tiny] [--steps 30] [--every 5]

Expected before it was measured: a file costs its bytes over the disk's speed, a folder the copy of its shards alone.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STRATEGIES = {"written by the step (DDP)": "ddp", "in the background (FSDP2)": "fsdp"}


def train_and_time(arguments: list[str], out: Path) -> None:
    """The command line in this process; the seconds that each save held the step up go to ``out``."""
    from bitnet_train.__main__ import answer
    from bitnet_train.training.callbacks.checkpoint import Checkpoints
    from bitnet_train.training.distributed.checkpoints import ReplicatedCheckpoints, ShardedCheckpoints

    seconds: list[float] = []

    def timed(kind: type[Checkpoints]) -> None:
        save = kind.save

        def wrapped(self: Any, *given: Any) -> bool:
            before, start = self.saved_step, time.perf_counter()
            saved: bool = save(self, *given)
            if self.saved_step != before and type(self) is kind:
                seconds.append(time.perf_counter() - start)
            return saved

        kind.save = wrapped  # type: ignore[method-assign]

    timed(ReplicatedCheckpoints)
    timed(ShardedCheckpoints)
    code = answer(arguments)
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(seconds[:-1]))  # the last one waits for the end of everything
    sys.exit(code)


def measure(strategy: str, settings: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Median seconds of a save and of a step, and the megabytes of a checkpoint."""
    name = f"stall_{strategy}"
    arguments = [
        f"+recipe={settings.recipe}", f"run_name={name}", f"paths.runs={folder}", f"paths.data={settings.data}",
        "trainer.devices=2", f"trainer.strategy={strategy}", "trainer.compile=false", "trainer.log_every=1",
        f"trainer.max_steps={settings.steps}", f"checkpoint.every_steps={settings.every}", "schedule=constant",
        "optimizer=adamw", "optimizer.lr=4e-3",  # FSDP shards no Muon
        "samples.every_steps=null", f"trainer.validate_every={settings.steps}",
    ]  # fmt: skip
    out = folder / f"{strategy}.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = [__file__, "--train", str(out), *arguments]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *here],
        env=environment, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    with (folder / name / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    # The clock of the metrics leaves saving out.
    tokens = float(rows[-1]["tokens"]) / float(rows[-1]["step"])
    steps = [tokens / float(row["tokens_per_second"]) for row in rows[2:]]
    last = (folder / name / "checkpoints" / "last.ckpt").resolve()
    files = [last] if last.is_file() else list(last.iterdir())
    return {
        "save": statistics.median(json.loads(out.read_text())),
        "step": statistics.median(steps),
        "megabytes": sum(file.stat().st_size for file in files) / 1e6,
    }


def main() -> None:
    """Measure both and print a table."""
    if sys.argv[1:2] == ["--train"]:
        train_and_time(sys.argv[3:], Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path("data"))
    settings = parser.parse_args()
    print("| checkpoint | MB | a step waits, ms | a step, ms | stall at every 100 steps |")
    print("| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for words, strategy in STRATEGIES.items():
            found = measure(strategy, settings, Path(folder))
            share = found["save"] / (100 * found["step"])
            print(f"| {words} | {found['megabytes']:.1f} | {found['save'] * 1e3:.0f} | {found['step'] * 1e3:.0f} "
                  f"| {share:.3%} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
