"""What goes wrong in one of several processes: one sentence and one exit code, and nobody waits for ever."""

import errno
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp

from bitnet_train.errors import ConfigError
from bitnet_train.training.callbacks.step import TrainingClock
from bitnet_train.training.distributed import checkpoints, group
from bitnet_train.training.distributed.launch import _code, _wait
from tests.training.conftest import Workspace, write_corpus
from tests.training.distributed.several import in_processes

SETTINGS = (
    "trainer.devices=2", "trainer.max_steps=9", "trainer.validate_every=9", "samples.every_steps=null", "run_name=a",
)  # fmt: skip
FSDP = "trainer.strategy=fsdp"
# Python runs this file at its start: it puts the code of PLANTED, given ``step`` and ``rank``, before every step.
PLANT = """
import importlib.abc, importlib.util, os, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "bitnet_train.training.module":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        plain = spec.loader.exec_module

        def exec_module(module):
            plain(module)
            before = module.TrainingModule.training_step

            def training_step(self, batch, index):
                exec(os.environ["PLANTED"], {"step": self.global_step, "rank": int(os.environ["RANK"]), "os": os})
                return before(self, batch, index)

            module.TrainingModule.training_step = training_step

        spec.loader.exec_module = exec_module
        return spec

if "RANK" in os.environ:
    sys.meta_path.insert(0, Finder())
"""


class Planted(Workspace):
    """A workspace whose processes meet a fault that is planted in them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder)
        self.monkeypatch = monkeypatch
        (folder / "plant").mkdir()
        (folder / "plant/sitecustomize.py").write_text(PLANT)
        monkeypatch.setenv("PYTHONPATH", f"{folder / 'plant'}:{Path(__file__).parents[3]}")

    def fails(self, planted: str, *arguments: str, code: int = 2) -> tuple[str, str]:
        """What a run with ``planted`` in it says at its end, in one line, and everything that it printed."""
        self.monkeypatch.setenv("PLANTED", planted)
        found, output = self.run(*SETTINGS, *arguments)
        assert found == code, output
        said = [line for line in output.splitlines() if line.startswith("bitnet_train: ")]
        assert len(said) == 1, output
        return said[0], output

    def steps(self) -> list[str]:
        """The names of what is saved."""
        return sorted(path.name for path in (self.folder / "runs/a/checkpoints").glob("step-*"))


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planted:
    write_corpus(tmp_path)
    return Planted(tmp_path, monkeypatch)


def quiet(output: str) -> bool:
    """Whether nothing was printed but what a run says, and one sentence."""
    return "Traceback" not in output and "frame #" not in output and len(output.splitlines()) < 25


CHANGED = """
if step == 4 and rank == 0:
    import glob
    path = glob.glob("data/*/train-00000.npy")[0]
    with open(path, "r+b") as stream:
        stream.seek(5000)
        stream.write(bytes(4000))
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_no_process_saves_what_was_trained_on_changed_data(planted: Planted, strategy: str) -> None:
    said, output = planted.fails(CHANGED, f"trainer.strategy={strategy}")
    assert "train-00000.npy was changed while the run read it: restore it" in said
    assert planted.steps() == ["step-00000003.ckpt"]
    assert quiet(output), output


def test_shards_that_cannot_be_written_stop_all_processes(planted: Planted) -> None:
    # A file where the folder of step 6 has to be made, which root cannot make either.
    said, output = planted.fails(
        "if step == 4 and rank == 0: open('runs/a/checkpoints/step-00000006.partial', 'w').close()", FSDP
    )
    assert "The checkpoint of step 6 cannot be written to runs/a/checkpoints (File exists): make the folder" in said
    assert "runs/a/checkpoints/step-00000003.ckpt is intact, and the same command goes on from it" in said
    assert quiet(output), output
    assert [path.name for path in (planted.folder / "runs/a/checkpoints").glob("*.partial")] == []


def write_on_full_disks(rank: int, folder: Path) -> list[str]:
    """What the save of a tensor ends with when the disk of process 1 is full: for its shard, then for its checksums."""
    said = []
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for step, (place, name) in enumerate(((dcp.FileSystemWriter, "write_data"), (checkpoints, "digest_files"))):
        saving = checkpoints.ShardedCheckpoints(TrainingClock(), folder)
        saving._hosts, saving._thread = group.new_host_group(), ThreadPoolExecutor(1)
        saving.saved(step)
        with mock.patch.object(place, name, side_effect=full) if rank == 1 else nullcontext():
            path, tensors = folder / f"step-{step:08d}.ckpt", {f"of{rank}": torch.ones(8)}
            saving._writing = saving._thread.submit(saving._write, path, {}, tensors, 2, 0)
            try:
                saving.wait()
            except ConfigError as error:
                said.append(str(error))
        saving._thread.shutdown()
    return said


def test_a_full_disk_of_one_process_is_said_by_all(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    wanted = [
        f"The checkpoint of step {step} cannot be written to {folder} (No space left on device): lower checkpoint.keep "
        "or free space; nothing was saved before."
        for step in (0, 1)
    ]
    assert in_processes(2, tmp_path, write_on_full_disks, folder) == [wanted, wanted]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("strategy", "rank"), [("ddp", 1), pytest.param("fsdp", 0, marks=pytest.mark.slow)])
def test_a_killed_process_is_named_with_its_signal(planted: Planted, strategy: str, rank: int) -> None:
    kill = f"if step == 7 and rank == {rank}: os.kill(os.getpid(), 9)"
    said, output = planted.fails(kill, f"trainer.strategy={strategy}")
    assert said == (
        f"bitnet_train: Process {rank} of 2 was killed by SIGKILL, which is what the system does when memory runs out: "
        "free memory or lower trainer.micro_batch or data.workers; runs/a/checkpoints/last.ckpt is intact, and the "
        "same command goes on from it."
    )
    assert quiet(output), output


@pytest.mark.parametrize(
    ("scripts", "codes", "killed"),
    [
        (("exit 6", "kill -9 $$"), [6, -9], 1),
        (("sleep 0.5; exit 6", "kill -SEGV $$"), [6, -11], 1),
        # One that has said what is wrong takes others along.
        (("exit 2", "sleep 0.5; kill -ABRT $$"), [2, -6], None),
        (("exit 143", "kill -TERM $$"), [143, -15], None),
    ],
)
def test_who_was_killed_before_anything_else_went_wrong(scripts: list[str], codes: list[int], killed: int) -> None:
    children = [subprocess.Popen(["sh", "-c", script]) for script in scripts]
    assert _wait(children) == (codes, killed)


@pytest.mark.parametrize(
    ("codes", "wanted"), [([0, 0], 0), ([2, 6], 2), ([0, 3], 3), ([6, 1], 1), ([6, 5], 5), ([-15, 6], 143), ([6, 0], 0)]
)
def test_the_code_of_a_run_is_of_a_process_that_knows_why(codes: list[int], wanted: int) -> None:
    assert _code(codes) == wanted


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:39624: Connection reset by peer. This is", True),
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:55976. This is typically", True),
        ("failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?", True),
        ("sendBytes failed on SocketImpl(fd=3): Broken pipe", True),
        ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting", True),
        # Two processes that do different things.
        ("[gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_a_lost_connection_is_told_from_a_bug(text: str, lost: bool) -> None:
    assert bool(group.CONNECTION_LOST.search(text)) is lost


@pytest.mark.slow
def test_the_traceback_of_a_bug_is_shown_whichever_process_meets_it(planted: Planted) -> None:
    said, output = planted.fails("if step == 4 and rank == 1: raise RuntimeError('a bug')", code=1)
    assert said == "bitnet_train: process 1 failed with RuntimeError: a bug"
    assert output.count("Traceback") == 1
    assert "RuntimeError: a bug" in output
