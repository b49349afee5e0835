"""Running out of memory ends with one sentence that says what to change, code 2, and the last checkpoint intact."""

import errno
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from bitnet_train.__main__ import answer
from bitnet_train.training.callbacks import validation
from bitnet_train.training.config import BatchPlan
from bitnet_train.training.module import PretrainingModule
from bitnet_train.training.out_of_memory import is_out_of_memory, training_advice
from tests.training.conftest import SETTINGS, Workspace
from tests.training.test_micro_batch import run


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (caused(RuntimeError("backend='inductor' raised:"), MemoryError()), True),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_advice_names_values() -> None:
    last = "runs/a/checkpoints/last.ckpt (step 30)"
    text = training_advice(BatchPlan(24, 12, 2), 512, 31, last, True)
    for part in ("in step 31", "12 x 512", "trainer.micro_batch=6 or trainer.micro_batch=auto", "=256", last, "intact"):
        assert part in text
    assert "trainer.micro_batch=3 " in training_advice(BatchPlan(9, 9, 1), 512, 1, None, True)
    assert "nothing was saved yet" in training_advice(BatchPlan(9, 9, 1), 512, 1, None, True)
    for text in (
        training_advice(BatchPlan(9, 1, 9), 2, 5, last, True),
        training_advice(BatchPlan(9, 9, 1), 2, 5, last, False),
    ):
        assert "micro_batch" not in text
        assert "data.sequence_length=1 or a smaller model" in text
    assert "sequence_length" not in training_advice(BatchPlan(9, 1, 9), 1, 5, last, True)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_training_that_runs_out_says_what_to_change(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    monkeypatch.chdir(workspace.folder)
    learn = PretrainingModule.training_step

    def step(self: PretrainingModule, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step == 4:
            raise error
        return learn(self, batch, batch_idx)

    settings = ("run_name=a", "trainer.max_steps=6", "schedule=constant", "samples.every_steps=null")
    with monkeypatch.context() as patch:
        patch.setattr(PretrainingModule, "training_step", step)
        assert run(workspace, *settings) == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert "Out of memory in step 5 with 8 x 32 tokens at once: set trainer.micro_batch=4" in sentence
    assert "runs/a/checkpoints/last.ckpt (step 3) is intact" in sentence
    assert torch.load("runs/a/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    assert run(workspace, *settings, "trainer.micro_batch=4") == 0
    assert "steps 3 to 6" in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
def test_validation_that_runs_out_does_not_blame_the_micro_batch(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.chdir(workspace.folder)
    monkeypatch.setattr(validation, "windows_loss", full)
    assert run(workspace, "run_name=a", "trainer.max_steps=6", "samples.every_steps=null") == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert "Out of memory while validating or sampling after step 5" in sentence
    assert "micro_batch" not in sentence


def test_other_commands_answer_with_one_sentence_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(cfg: object) -> int:
        raise MemoryError("Unable to allocate 7.3 TiB for an array.")

    monkeypatch.setattr("bitnet_train.commands.run", full)
    for sweep in ([], ["-m", "seed=1,2"]):
        assert answer(["+recipe=tiny", "command=estimate", *sweep]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 + bool(sweep)
        assert all(
            "This machine ran out of memory (Unable to allocate 7.3 TiB for an array):" in line for line in lines
        )
        assert all("nothing" not in line and "is intact" in line for line in lines)


CHILD = """
import resource, sys
import bitnet_train.training.run
from bitnet_train.__main__ import answer
used = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20, resource.RLIM_INFINITY))
sys.exit(answer(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's RLIMIT_AS")
def test_a_process_with_too_little_memory_ends_with_one_sentence(workspace: Workspace) -> None:
    settings = [*SETTINGS, f"data.corpus.path={workspace.folder}/corpus", "run_name=a", "trainer.max_steps=6"]

    # 1,024 sequences of 32 tokens by an FFN of 4,096: half a gigabyte for one activation in float32.
    large = ("model.ffn=4096", "trainer.batch_tokens=32768")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *settings, *large],
        cwd=workspace.folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (sentence,) = done.stderr.strip().splitlines()
    assert "Out of memory in step 1 with 1024 x 32 tokens at once: set trainer.micro_batch=512 or" in sentence
    assert "nothing was saved yet" in sentence
