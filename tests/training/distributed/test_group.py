"""What processes say to each other, with two of them; and which process this is."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.errors import ConfigError, DivergedError
from bitnet_train.ranks import Ranks, this_process
from bitnet_train.training.distributed import group
from tests.training.conftest import Workspace
from tests.training.distributed.several import in_processes


def talk(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["largest"] = group.largest(rank, 10 - rank)
    found["smallest"] = group.smallest(5 + rank)
    found["summed"] = group.summed([1.5 + rank, 2.0])
    found["mean"] = float(group.mean(torch.tensor(float(rank))))
    found["from_first"] = group.from_first(lambda: f"of {rank}")
    order = folder / "order"

    def write() -> int:
        order.write_text((order.read_text() if order.exists() else "") + str(rank))
        return rank * 10

    found["in_turn"] = group.in_turn(write)

    def fail(where: int) -> None:
        if rank == where:
            raise DivergedError(f"failed in {rank}")

    for name, attempt in {
        "second fails": lambda: group.in_turn(lambda: fail(1)),
        "first fails": lambda: group.in_turn(lambda: fail(0)),
        "first fails alone": lambda: group.from_first(lambda: fail(0)),
        "agreed": lambda: group.agree(ConfigError("wrong") if rank == 1 else None),
    }.items():
        try:
            attempt()
        except (ConfigError, DivergedError) as error:
            found[name] = str(error), error.exit_code
    group.agree(None)
    # At last one fails while the other waits for it.
    try:
        with group.failing_together():
            if rank == 1:
                raise ConfigError("no memory in 1")
            found["code"] = None
            while (told := group.announced(30)) is None:
                pass
            raise RuntimeError(f"connection closed: {told}")
    except ConfigError as error:
        found["told"] = str(error), error.exit_code
    return found


def test_two_processes_agree(tmp_path: Path) -> None:
    first, second = in_processes(2, tmp_path, talk, tmp_path)
    for found in (first, second):
        assert found["largest"] == [1, 10]
        assert found["smallest"] == 5
        assert found["summed"] == [4.0, 4.0]
        assert found["mean"] == 0.5
        assert found["from_first"] == "of 0"
        assert found["second fails"] == ("failed in 1", 3)
        assert found["first fails"] == found["first fails alone"] == ("failed in 0", 3)
        assert found["agreed"] == ("wrong", 2)
        assert found["told"] == ("no memory in 1", 2)
    assert (first["in_turn"], second["in_turn"]) == (0, 10)
    assert (tmp_path / "order").read_text() == "01"


def test_a_single_process_does_things_at_once() -> None:
    assert group.world() == 1
    assert group.first()
    assert group.largest(3) == [3]
    assert group.in_turn(lambda: 4) == group.from_first(lambda: 4) == 4
    tensor = torch.ones(())
    assert group.mean(tensor) is tensor
    with pytest.raises(ConfigError, match="wrong"), group.failing_together():
        group.agree(ConfigError("wrong"))


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, Ranks()),
        (
            {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
            Ranks(5, 1, 8, 4, "torchrun"),
        ),
        (
            {
                "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
                "SLURM_NTASKS": "4",
            },
            Ranks(3, 1, 4, 2, "srun"),
        ),
        # The batch script of a job with four tasks is one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, Ranks()),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Ranks()),
        (
            {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "BITNET_TRAIN_LAUNCHER": "1"},
            Ranks(1, 1, 2, 2, "bitnet_train"),
        ),
    ],
)  # fmt: skip
def test_which_process_this_is(environment: dict[str, str], wanted: Ranks) -> None:
    assert this_process(environment) == wanted
    assert wanted.first == (wanted.rank == 0)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"RANK": "abc", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=abc, which must be a whole number from 0 to 1"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=2, which must be a whole number from 0 to 1"),
        ({"RANK": "0", "LOCAL_RANK": "-1", "WORLD_SIZE": "2"}, "LOCAL_RANK=-1, which must be a whole number from 0"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE=, which must be a whole number from 1"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS=x, which must be a whole number from 1"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1.0"}, "SLURM_PROCID=1.0, which must be a whole number"),
    ],
)
def test_numbers_that_are_none_are_said(environment: dict[str, str], wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"The environment says {re.escape(wanted)}"):
        this_process(environment)


@pytest.mark.parametrize(
    "environment", [{"RANK": "abc", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, {"SLURM_STEP_NUM_TASKS": "x"}]
)
def test_a_command_answers_them_in_one_sentence(
    environment: dict[str, str], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, output = workspace.run("run_name=a")
    assert code == 2
    assert output.startswith("bitnet_train: The environment says ")
    assert output.count("\n") == 1
