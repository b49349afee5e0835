"""Lightning in a SLURM job."""

from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment


def slurm_plugins() -> list[Any]:
    """The environment of a job that srun started; empty elsewhere.

    Lightning's own requeuing is off: it saves in the middle of a step, to a file that no run goes on from.
    """
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
