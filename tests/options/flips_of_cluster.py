"""Flips of ``cluster`` and ``submit``."""

from tests.options.flip import Flip, each

FLIPS: dict[str, Flip] = {
    "submit": Flip("submit=true", ("command=submit",), see="submitted"),
    **each(
        {
            "command": "prepare", "nodes": "2", "gpus_per_node": "0", "cpus_per_task": "2", "memory": "64G",
            "time": "01:00:00", "partition": "p", "account": "a", "qos": "q", "constraint": "c",
            "container": "/x.sif", "python": "/opt/python", "modules": "[cuda]", "setup": "['export X=1']",
            "signal_lead": "60", "max_requeues": "3", "sbatch": "['--exclusive']",
        },
        under="cluster.", see="scripted",
    ),
    **each({"container_engine": "enroot", "container_mounts": "[/data]"}, "cluster.container=/x.sif", under="cluster.",
           see="scripted"),
    **each({"array": "4"}, "cluster.command=prepare", under="cluster.", see="scripted"),
    **each({"stop_before_end": "null"}, under="cluster.", see="stopped"),
}  # fmt: skip
