"""What of the cluster settings is refused, in one sentence, and how many processes a job gets."""

from types import SimpleNamespace

import pytest

from bitnet_train.cluster.config import ClusterConfig, check_cluster, seconds
from bitnet_train.cluster.layout import Layout, job_layout
from bitnet_train.errors import ConfigError
from tests.composing import compose_config


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("cluster.command=submit", "cluster.command=submit is nothing that a job does: use one of train, prepare"),
        ("cluster.nodes=-1", "cluster.nodes is -1; it must be at least 1"),
        ("cluster.gpus_per_node=-1", "cluster.gpus_per_node is -1; it must be at least 0"),
        ("cluster.cpus_per_task=0", "cluster.cpus_per_task is 0; it must be at least 1"),
        ("cluster.array=0", "cluster.array is 0"),
        ("cluster.array=4", "cluster.array is for cluster.command=prepare, not train"),
        ("cluster.max_requeues=-1", "cluster.max_requeues is -1"),
        ("cluster.signal_lead=0", "cluster.signal_lead is 0"),
        ("cluster.signal_lead=86400", "cluster.signal_lead=86400 seconds are not less than cluster.time=24:00:00"),
        ("cluster.stop_before_end=-5", "cluster.stop_before_end is -5"),
        ("cluster.stop_before_end=nan", "cluster.stop_before_end is nan"),
        ("cluster.time=24h", "cluster.time=24h is no time limit"),
        ("cluster.time=90", "cluster.time=90 is no time limit"),
        ("cluster.time='20:00'", "cluster.time=20:00 is no time limit"),
        ("cluster.time='00:00:00'", "cluster.time=00:00:00 is no time limit"),
        ("cluster.time='10:75:00'", "cluster.time=10:75:00 is no time limit"),
        ("cluster.partition='gpu;rm -rf x'", "cluster.partition='gpu;rm -rf x' is not usable in a job"),
        ("cluster.partition=''", "cluster.partition=''"),
        ("cluster.account='$(id)'", "cluster.account='$(id)'"),
        ("cluster.qos='a b'", "cluster.qos='a b'"),
        ("cluster.constraint='a100`id`'", "cluster.constraint="),
        ("cluster.memory=64GB", "cluster.memory='64GB' is not usable in a job: it must be a number with K, M, G or T"),
        ("cluster.container='x.sif;id'", "cluster.container='x.sif;id'"),
        ("cluster.container=--fakeroot", "cluster.container='--fakeroot'"),
        ("cluster.container_mounts=[/data]", "cluster.container_mounts does nothing without cluster.container"),
        ("cluster.container_mounts=[data]", "cluster.container_mounts holds 'data'"),
        ("cluster.python='python;id'", "cluster.python='python;id'"),
        ("cluster.modules=['cuda;id']", "cluster.modules holds 'cuda;id'"),
        ("cluster.setup=['']", "cluster.setup holds ''"),
        ("cluster.sbatch=['exclusive']", "cluster.sbatch holds 'exclusive'"),
        ("cluster.sbatch=['--comment=$(id)']", "cluster.sbatch holds '--comment=$(id)'"),
        ("cluster.sbatch=['--nodes=2']", "cluster.sbatch holds --nodes=2: set cluster.nodes instead"),
        ("cluster.sbatch=['--output=x']", "cluster.sbatch holds --output=x, which the job sets for itself"),
        ("submit=true", "submit=true hands a job to a cluster: it goes with command=submit"),
    ],
)
def test_a_setting_that_slurm_would_misunderstand_is_refused(setting: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose_config("+recipe=tiny", setting)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "cfg",
    [
        ClusterConfig(partition="gpu\n#SBATCH --wrap=x"),
        ClusterConfig(setup=["true\n#SBATCH --wrap=x"]),
        ClusterConfig(sbatch=["--comment=a\nrm"]),
        ClusterConfig(modules=["cuda\nid"]),
        ClusterConfig(container="x.sif\nid"),
        ClusterConfig(python="python\nid"),
    ],
)
def test_a_second_line_is_refused(cfg: ClusterConfig) -> None:
    with pytest.raises(ConfigError) as refused:
        check_cluster(cfg, ["train"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("time", "length"), [("00:10:00", 600), ("24:00:00", 86400), ("2-00:00:00", 172800), ("1-06:30", 109800)]
)
def test_time_limits(time: str, length: int) -> None:
    assert seconds(time) == length


@pytest.mark.parametrize(
    ("cluster", "trainer", "accelerator", "layout"),
    [
        ({}, {}, "auto", Layout(1, 1, 1)),
        ({}, {}, "cpu", Layout(1, 1, 0)),
        ({"gpus_per_node": 0}, {}, "auto", Layout(1, 1, 0)),
        ({}, {"devices": 8, "num_nodes": 4}, "auto", Layout(4, 8, 8)),
        ({}, {"devices": 2, "num_nodes": 1}, "cpu", Layout(1, 2, 0)),
        ({"nodes": 4}, {"devices": 8, "num_nodes": 1}, "auto", Layout(4, 8, 8, ("trainer.num_nodes=4",))),
        ({"nodes": 2, "gpus_per_node": 8}, {"devices": "auto", "num_nodes": 2}, "auto",
         Layout(2, 8, 8, ("trainer.devices=8",))),
        ({"gpus_per_node": 4}, {"devices": 1, "num_nodes": 1}, "cuda", Layout(1, 4, 4, ("trainer.devices=4",))),
    ],
)  # fmt: skip
def test_one_process_for_each_device(
    cluster: dict[str, int], trainer: dict[str, object], accelerator: str, layout: Layout
) -> None:
    assert job_layout(ClusterConfig(**cluster), SimpleNamespace(**trainer), accelerator, "train") == layout


def test_only_training_takes_several() -> None:
    trainer = SimpleNamespace(devices=8, num_nodes=4)
    assert job_layout(ClusterConfig(), trainer, "auto", "evaluate") == Layout(1, 1, 1)
    assert job_layout(ClusterConfig(), trainer, "auto", "prepare") == Layout(1, 1, 0)


@pytest.mark.parametrize(
    ("cluster", "trainer", "sentence"),
    [
        ({"nodes": 2}, {"devices": 8, "num_nodes": 4}, "cluster.nodes=2, but training is on trainer.num_nodes=4"),
        ({"nodes": 2}, {}, "cluster.nodes=2, but training is on trainer.num_nodes=1"),
        ({"gpus_per_node": 4}, {"devices": 8}, "cluster.gpus_per_node=4, but 8 of each node's would train"),
    ],
)
def test_contradictions_are_refused(cluster: dict[str, int], trainer: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        job_layout(ClusterConfig(**cluster), SimpleNamespace(**trainer), "auto", "train")
