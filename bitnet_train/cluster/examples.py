"""The scripts in slurm/, to be read and adapted: ``python -m bitnet_train.cluster.examples`` writes them anew."""

from dataclasses import dataclass, replace
from pathlib import Path

from bitnet_train.cluster.config import ClusterConfig
from bitnet_train.cluster.layout import Layout
from bitnet_train.cluster.render import Job, render


@dataclass(frozen=True)
class Example:
    """One script: what it asks for, what it runs, and what a reader should know."""

    remarks: tuple[str, ...]
    layout: Layout
    arguments: tuple[str, ...]
    cluster: ClusterConfig


# What most clusters want to know, and an environment that has been made with make setup.
BASE = ClusterConfig(
    partition="gpu", account="project", memory="64G", setup=["source .venv/bin/activate"], python="python"
)

EXAMPLES: dict[str, Example] = {
    "one_gpu": Example(
        ("One GPU: train the 125M recipe.",),
        Layout(1, 1, 1),
        ("+recipe=125m", "data=hub", "data.corpus.path=HuggingFaceFW/fineweb-edu", "data.corpus.subset=sample-10BT"),
        replace(BASE, time="12:00:00"),
    ),
    "one_node": Example(
        ("One node with eight GPUs, a process for each.",),
        Layout(1, 8, 8),
        ("+recipe=700m", "data=hub", "data.corpus.path=HuggingFaceFW/fineweb-edu", "data.corpus.subset=sample-100BT",
         "trainer.devices=8"),
        replace(BASE, memory="0", sbatch=["--exclusive"]),
    ),
    "many_nodes": Example(
        ("Eight nodes with eight GPUs each; modules, and a container that all nodes see.",
         "Prepare the shards before (prepare_array.sbatch): 64 processes would wait for them."),
        Layout(8, 8, 8),
        ("+recipe=2b4t", "data=hub", "data.corpus.path=HuggingFaceFW/fineweb-edu", "data.corpus.subset=sample-350BT",
         "trainer.devices=8", "trainer.num_nodes=8", "trainer.strategy=fsdp"),
        replace(
            BASE, time="2-00:00:00", memory="0", constraint="h100", modules=["apptainer"], setup=[], python=None,
            container="/shared/images/bitnet_train.sif", container_mounts=["/shared/data"], signal_lead=300,
            sbatch=["--exclusive"],
        ),
    ),
    "prepare_array": Example(
        ("Token shards by sixteen tasks; the same line again takes up what is missing.",),
        Layout(1, 1, 0),
        ("+recipe=2b4t", "data=hub", "data.corpus.path=HuggingFaceFW/fineweb-edu", "data.corpus.subset=sample-350BT",
         "command=prepare"),
        replace(BASE, partition="cpu", time="08:00:00", memory="32G", command="prepare", array=16),
    ),
    "evaluate": Example(
        ("Evaluate a finished run on tasks of lm-evaluation-harness, on one GPU.",),
        Layout(1, 1, 1),
        ("run=runs/125m", "evaluate.tasks=[arc_easy,hellaswag,piqa]", "command=evaluate"),
        replace(BASE, time="04:00:00", command="evaluate"),
    ),
}  # fmt: skip

MARK = "An example that bitnet_train's command=submit has rendered: put your partition, account and folders in,"
HOW = "or let command=submit write one for your recipe (cluster.partition=..., see README, On a cluster)."


def texts() -> dict[str, str]:
    """File name -> script."""
    found = {}
    for name, example in EXAMPLES.items():
        number = "%j" if example.cluster.array is None else "%A_%a"
        job = Job(
            name=name,
            arguments=example.arguments,
            layout=example.layout,
            log=f"slurm-{name}-{number}.out",
            remarks=(*example.remarks, MARK, HOW),
        )
        found[f"{name}.sbatch"] = render(example.cluster, job)
    return found


def main() -> None:
    """Write slurm/*.sbatch of this checkout."""
    folder = Path(__file__).resolve().parent.parent.parent / "slurm"
    for name, text in texts().items():
        (folder / name).write_text(text)
        print(folder / name)


if __name__ == "__main__":
    main()
