"""``hydra/launcher=slurm``: Hydra takes launchers from this namespace only; see bitnet_train/slurm_launch.py."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as SubmititLauncher
except ImportError:
    SubmititLauncher = None  # said where the launcher is asked for

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

if SubmititLauncher is not None:

    class SlurmLauncher(SubmititLauncher):  # type: ignore[misc, valid-type]
        """A sweep as an array of SLURM jobs, which take what they need from the ``cluster`` settings."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence["JobReturn"]:
            """Submit the jobs and wait for all of them, whatever becomes of some."""
            from bitnet_train.slurm_launch import launch

            return launch(self, job_overrides, initial_job_idx)
