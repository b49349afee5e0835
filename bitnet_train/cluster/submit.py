"""Hands an sbatch script to SLURM."""

import os
import shutil
import subprocess
from pathlib import Path

from bitnet_train.errors import ConfigError


def submit(script: Path) -> str:
    """The id of the job that ``script`` became. Raises ConfigError without SLURM and when SLURM refuses it."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            f"submit=true needs SLURM's sbatch, which is not on this machine: run sbatch {script} where it is."
        )
    # What belongs to a job that this is typed in must not become the new job's.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        lines = [line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if line.strip()]
        raise ConfigError(f"SLURM refuses {script}: {' '.join(lines) or f'sbatch ends with {done.returncode}'}")
    return done.stdout.strip().split(";")[0]
