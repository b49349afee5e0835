"""What the cluster settings do: to the script of a job, to its submission, to a run in a job."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from bitnet_train.commands import train
from tests.options.observe import configure, run_quietly, settings
from tests.options.place import Place


def scripted(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script of a job without the settings that its command line repeats; or why there is none."""
    del monkeypatch
    code, output = place.answer(*settings(place, changes), "command=submit", "run_name=job")
    if code == 2:
        return output
    assert code == 0, output
    script = output[output.index("#!/bin/bash") : output.index("written: ")]
    return re.sub(r"results/\d+", "results", re.sub(r"bitnet_train \\\n(.*\n)*?.*\|\| status", "bitnet_train", script))


def submitted(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What sbatch is given."""
    folder = place.folder / "results" / str(place.count)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sbatch").write_text(f'#!/bin/bash\necho "$1" >> {folder}/asked\necho 41\n')
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    code, output = place.answer(*settings(place, changes), "run_name=job")
    assert code == 0, output
    asked = Path(folder / "asked")
    return asked.read_text() if asked.exists() else None


def stopped(place: Place, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exit code of a run in a job that ends in half a minute."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 30))
    return run_quietly(train.run, configure(place, changes))[0]
