"""The settings of several processes: what is refused, how a step is shared, and who sees which sample."""

from itertools import islice

import pytest

from bitnet_train.data.images.batches import SampleNumbers
from bitnet_train.data.sampler import ConsumedBatchSampler
from bitnet_train.errors import ConfigError
from bitnet_train.ranks import Ranks
from bitnet_train.training.batch_warmup import BatchStageConfig
from bitnet_train.training.config import TrainerConfig, batch_plan, micro_batches
from bitnet_train.training.distributed.checks import check_started
from tests.composing import compose_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("trainer.devices=0",), "trainer.devices is 0; it must be at least 1"),
        (("trainer.devices=all",), "trainer.devices=all is unknown: use a number of processes, or auto"),
        (("trainer.num_nodes=0",), "trainer.num_nodes is 0"),
        (("trainer.devices=3",), "The 16 sequences of a step cannot be shared evenly by 3 processes"),
        (("trainer.devices=2", "trainer.micro_batch=16"), "The 1 micro-batches of a step cannot be shared evenly by 2"),
        (("trainer.devices=3", "trainer.micro_batch=auto"), "cannot be shared evenly by 3 processes"),
        (("trainer.hang_timeout=0",), "trainer.hang_timeout is 0; it must be a positive number of minutes"),
        (("trainer.strategy=fsdp", "optimizer=muon"), "optimizer=muon orthogonalises whole matrices"),
        (("trainer.strategy=fsdp", "optimizer=adamw_8bit"), "optimizer=adamw_8bit keeps moments in blocks"),
        (("trainer.strategy=fsdp", "quant/progressive=switch"), "quant/progressive=switch mixes master weights"),
        (("trainer.strategy=fsdp", "trainer.micro_batch=auto"), "measures the whole model on one device"),
        (("trainer.strategy=fsdp", "trainer.compile=true"), "trainer.compile=true does not work with"),
        (("trainer.devices=2", "command=benchmark"), "command=benchmark times one process"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_composed(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_config(
            "+recipe=tiny", "optimizer=adamw", "trainer.batch_tokens=4096", "data.sequence_length=256", *settings
        )
    assert message in str(error.value)


def test_the_processes_that_run_must_be_those_that_are_wanted() -> None:
    cfg = compose_config("+recipe=tiny", "trainer.devices=2", "trainer.num_nodes=2")
    check_started(cfg, Ranks(0, 0, 4, 2, "srun"))
    with pytest.raises(ConfigError, match=r"srun started 3 .*devices=2 x trainer.num_nodes=2 is 4"):
        check_started(cfg, Ranks(0, 0, 3, 3, "srun"))
    with pytest.raises(ConfigError, match="needs something that starts the processes on every node"):
        check_started(cfg, Ranks())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_is_shared_and_every_sample_seen_once_in_the_order_of_one_process(world: int) -> None:
    stages = [BatchStageConfig(2, 64), BatchStageConfig(4, 128)]
    trainer = TrainerConfig(max_steps=9, batch_tokens=256, micro_batch=4, devices=world, batch_warmup=stages)
    plan = batch_plan(trainer, 16)
    assert (plan.pieces, plan.accumulation, plan.processes) == (4, 4 // world, world)
    order = list(range(1000))
    for first in (0, 1, 3, 6):
        samplers = [
            iter(
                ConsumedBatchSampler(
                    50, plan.micro_batch, 3, plan.consumed(first), rank, world, plan.early_batches(first), order.index
                )
            )
            for rank in range(world)
        ]
        for step in range(first, 8):
            found = [n for s in samplers for batch in islice(s, plan.accumulation) for n in batch]
            assert sorted(found) == list(range(plan.consumed(step), plan.consumed(step + 1)))


def test_whole_steps_are_cut_into_one_micro_batch_per_process() -> None:
    plan = batch_plan(TrainerConfig(batch_tokens=256, devices=2, num_nodes=2), 16)
    assert (plan.micro_batch, plan.accumulation, plan.pieces) == (4, 1, 4)
    assert plan.words == "4 processes x 1 x 4"
    assert micro_batches(TrainerConfig(batch_tokens=256, devices=2), 16) == [1, 2, 4, 8]


def test_images_are_shared_in_the_same_way() -> None:
    samplers = [iter(SampleNumbers(3, 7, rank, 2)) for rank in range(2)]
    assert [next(s) for s in (samplers[0], samplers[1], samplers[0])] == [[7, 8, 9], [10, 11, 12], [13, 14, 15]]
