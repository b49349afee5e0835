"""Runs of several processes from the command line: the same losses as one process, and one of everything that is
written and said."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.training.distributed.checkpoint_files import check_folder, read_checkpoint
from bitnet_train.training.run_folder import RunFolder
from tests.training.conftest import Workspace, write_corpus

# 65 rows do not divide by two processes.
SETTINGS = (
    "model.ffn=65", "trainer.precision=32-true", "schedule=constant", "optimizer.lr=1e-3", "trainer.validate_every=10",
)  # fmt: skip
ACCUMULATED = (*SETTINGS, "trainer.micro_batch=2")
TWO = ("trainer.devices=2",)
FSDP = (*TWO, "trainer.strategy=fsdp")


class Shared(Workspace):
    """A workspace for all tests of this module, with the run of one process that they compare with."""

    def go(self, *arguments: str) -> str:
        code, output = self.run(*arguments)
        assert code == 0, output
        assert "Traceback" not in output
        assert "Warning" not in output
        return output

    def compare(self, run: str, since: int = 1, until: int = 20) -> None:
        """The losses of ``run`` are those of the run of one process."""
        wanted = {int(row["step"]): row for row in self.rows("one")}
        found = {int(row["step"]): row for row in self.rows(run)}
        assert sorted(found) == list(range(1, until + 1))
        for step in range(since, until + 1):
            for column in ("train/loss", "val/loss", "val/bits_per_byte", "lr", "tokens"):
                mine, theirs = found[step][column], wanted[step][column]
                if mine and theirs:  # a run validates at its end, too
                    assert float(mine) == pytest.approx(float(theirs), rel=1e-3), (step, column)
            # Codes that flip a step earlier move the norm more than the loss: later they drift apart.
            if step <= 5:
                assert float(found[step]["grad_norm"]) == pytest.approx(float(wanted[step]["grad_norm"]), rel=1e-3)
        assert found[10]["val/loss"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("shared")
    write_corpus(folder)
    workspace = Shared(folder)
    workspace.go(*ACCUMULATED, "run_name=one", "trainer.max_steps=20")
    return workspace


def sharded(shared: Shared) -> None:
    """There is a run ``fsdp`` of two processes and 12 steps."""
    if not (shared.folder / "runs/fsdp").exists():
        shared.go(*ACCUMULATED, *FSDP, "run_name=fsdp", "trainer.max_steps=12", "checkpoint.keep=9")


def test_ddp_has_the_losses_of_one_process(shared: Shared) -> None:
    output = shared.go(*ACCUMULATED, *TWO, "run_name=ddp", "trainer.max_steps=20")
    shared.compare("ddp")
    assert "(2 processes x 2 x 2 sequences of 32)" in output
    # Written and said once.
    assert output.count("training tokens") == output.count("run folder: ") == 1
    folder = shared.folder / "runs/ddp"
    assert (folder / "samples.md").read_text() == (shared.folder / "runs/one/samples.md").read_text()
    assert (folder / "provenance.json").read_text().count('"started"') == 1
    assert len((folder / "layers.csv").read_text().splitlines()) == 1 + 14
    assert all(path.is_file() for path in (folder / "checkpoints").iterdir())
    # Nobody has put a file of the run's in its place.
    assert Path(os.devnull).is_char_device()


def test_fsdp_with_uneven_shards_has_the_losses_of_one_process_and_resumes_on_1_and_4(shared: Shared) -> None:
    sharded(shared)
    shared.compare("fsdp", until=12)
    last = shared.folder / "runs/fsdp/checkpoints/last.ckpt"
    assert last.is_dir()
    assert last.resolve().name == "step-00000012.ckpt"
    assert sorted(p.name for p in last.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    for processes in (1, 4):
        run = f"on{processes}"
        shutil.copytree(shared.folder / "runs/fsdp", shared.folder / f"runs/{run}", symlinks=True)
        strategy = () if processes == 1 else (f"trainer.devices={processes}", "trainer.strategy=fsdp")
        output = shared.go(*ACCUMULATED, *strategy, f"run_name={run}", "trainer.max_steps=20")
        assert "steps 12 to 20" in output
        shared.compare(run)


def test_the_same_number_of_processes_goes_on_with_the_same_bits(shared: Shared) -> None:
    sharded(shared)
    checkpoints = shared.folder / "runs/again/checkpoints"
    shutil.copytree(shared.folder / "runs/fsdp", checkpoints.parent, symlinks=True)
    (checkpoints / "last.ckpt").unlink()
    shutil.rmtree(checkpoints / "step-00000012.ckpt")
    output = shared.go(*ACCUMULATED, *FSDP, "run_name=again", "trainer.max_steps=12")
    assert "steps 9 to 12" in output
    assert shared.losses("again") == shared.losses("fsdp")


def test_what_reads_a_run_reads_its_shards_and_passes_over_broken_ones(shared: Shared) -> None:
    sharded(shared)
    shutil.copytree(shared.folder / "runs/fsdp", shared.folder / "runs/read", symlinks=True)
    shared.go("command=export", "run=runs/read", "export.formats=[packed]")
    before = [row["val/bits_per_byte"] for row in shared.rows("read") if row["val/bits_per_byte"]][-1]
    output = shared.go("command=evaluate", "run=runs/read")
    figure = re.search(r"bits per byte\s*│\s*([\d.]+)", output)
    assert figure is not None, output
    assert float(figure[1]) == pytest.approx(float(before), rel=1e-3)


def test_a_damaged_shard_is_found_by_its_checksum(shared: Shared) -> None:
    sharded(shared)
    folder = RunFolder(shared.folder / "runs/damaged")
    shutil.copytree(shared.folder / "runs/fsdp", folder.path, symlinks=True)
    said: list[str] = []
    assert folder.good_checkpoint(said.append) == folder.checkpoints / "last.ckpt"
    assert said == []
    shard = folder.checkpoints / "step-00000012.ckpt/__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert folder.good_checkpoint(said.append) == folder.checkpoints / "step-00000009.ckpt"
    assert "the checksum of __1_0.distcp does not match" in said[0]
    shard.unlink()
    with pytest.raises(ValueError, match=r"__1_0\.distcp is missing"):
        check_folder(shard.parent)


class Planted:
    """Would create a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_the_metadata_of_shards_is_executed(shared: Shared, tmp_path: Path) -> None:
    sharded(shared)
    shutil.copytree(shared.folder / "runs/fsdp/checkpoints/step-00000012.ckpt", tmp_path / "shards")
    planted = tmp_path / "planted"
    (tmp_path / "shards/.metadata").write_bytes(pickle.dumps(Planted(planted)))
    with pytest.raises(ValueError, match=r"its \.metadata is damaged \(UnpicklingError\)"):
        check_folder(tmp_path / "shards")
    with pytest.raises(pickle.UnpicklingError, match="does not belong into a checkpoint"):
        read_checkpoint(tmp_path / "shards")
    assert not planted.exists()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_all_processes_after_the_same_step(
    shared: Shared, number: signal.Signals, exit_code: int
) -> None:
    run, strategy = f"stop{int(number)}", FSDP if number == signal.SIGINT else TWO
    settings = (*SETTINGS, f"run_name={run}", "checkpoint.every_steps=20", "checkpoint.keep=3")
    process = shared.start(*settings, *strategy, "trainer.max_steps=4000")
    output = shared.signal_at(process, run, 20, number)
    assert process.returncode == exit_code, output
    assert "Traceback" not in output
    stopped_at = int(re.search(r"stopped at step (\d+)", output)[1])  # type: ignore[index]
    assert (shared.folder / f"runs/{run}/checkpoints/step-{stopped_at:08d}.ckpt").exists()
    assert shared.rows(run)[-1]["step"] == str(stopped_at)


@pytest.mark.slow
def test_torchrun_starts_them_too_and_a_wrong_number_is_one_message(shared: Shared) -> None:
    command = shared.command(*SETTINGS, "run_name=torchrun", "trainer.max_steps=2")[1:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for more, wanted in (((), 1), (TWO, 0)):
        found = subprocess.run(
            [*torchrun, *more], cwd=shared.folder, env=environment, capture_output=True, text=True, timeout=240
        )
        assert found.returncode == wanted, found.stderr
        said = [line for line in found.stderr.splitlines() if line.startswith("bitnet_train: ")]
        if wanted:
            assert said == [
                "bitnet_train: torchrun started 2 processes, but trainer.devices=1 x trainer.num_nodes=1 is 1: make "
                "them the same."
            ]
            assert found.stderr.count("exitcode  : 2") >= 1
        else:
            assert said == []
            assert len(shared.rows("torchrun")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("loss.reduction=sum",), id="sum"),
        pytest.param(("quant=none",), id="dense"),
        pytest.param(("clip=by_pattern", "clip.rules=[{pattern: '*', clip: {name: percentile}}]"), id="clip"),
        pytest.param(("trainer.batch_warmup=[{until: 6, tokens: 128}]",), id="warm-up"),
        pytest.param(("data.workers=1", "guard.skip_non_finite=true"), id="workers-and-guard"),
    ],
)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_options_have_the_losses_of_one_process(shared: Shared, settings: tuple[str, ...], strategy: str) -> None:
    name = re.sub(r"\W", "", settings[0]) + strategy
    for run, several in (("one", ()), ("two", (*TWO, f"trainer.strategy={strategy}"))):
        shared.go(*ACCUMULATED, *settings, *several, f"run_name={name}{run}", "trainer.max_steps=10")
    pairs = zip(shared.rows(f"{name}one"), shared.rows(f"{name}two"), strict=True)
    for one, two in pairs:
        assert float(two["train/loss"]) == pytest.approx(float(one["train/loss"]), rel=1e-3)
        if int(one["step"]) <= 5:
            assert float(two["grad_norm"]) == pytest.approx(float(one["grad_norm"]), rel=1e-2)


@pytest.mark.slow
def test_a_checkpoint_that_is_a_file_continues_on_shards_and_back(shared: Shared) -> None:
    shared.go(*ACCUMULATED, "run_name=mixed", "trainer.max_steps=6")
    shared.go(*ACCUMULATED, *FSDP, "run_name=mixed", "trainer.max_steps=12")
    shared.go(*ACCUMULATED, *TWO, "run_name=mixed", "trainer.max_steps=16")
    shared.go(*ACCUMULATED, "run_name=mixed", "trainer.max_steps=20")
    shared.compare("mixed")


@pytest.mark.slow
def test_of_two_commands_on_one_run_folder_the_second_is_refused(shared: Shared, tmp_path: Path) -> None:
    settings = (*SETTINGS, *TWO, "run_name=claimed")
    process = shared.start(*settings, "trainer.max_steps=4000", "checkpoint.every_steps=5")
    shared._wait(lambda: (shared.folder / "runs/claimed/checkpoints/last.ckpt").exists() or process.poll() is not None)
    code, output = shared.run(*settings, "trainer.max_steps=4000")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert code == 2, output
    assert output.count("bitnet_train: ") == 1
    assert "is in use by process" in output
    assert "Traceback" not in output


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_have_the_losses_of_one(shared: Shared, strategy: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there are not two GPUs")
    settings = (*ACCUMULATED, "trainer.accelerator=cuda", "trainer.max_steps=10")
    shared.go(*settings, f"run_name=gpu1{strategy}")
    shared.go(*settings, *TWO, f"trainer.strategy={strategy}", f"run_name=gpu2{strategy}")
    for one, two in zip(shared.rows(f"gpu1{strategy}"), shared.rows(f"gpu2{strategy}"), strict=True):
        assert float(two["train/loss"]) == pytest.approx(float(one["train/loss"]), rel=1e-3)
