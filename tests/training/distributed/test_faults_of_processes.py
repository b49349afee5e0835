"""What goes wrong in one of several processes: one sentence and one exit code, and nobody waits for ever."""

from pathlib import Path

import pytest

from tests.training.conftest import Workspace, write_corpus

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
    planted.monkeypatch.setenv("PLANTED", "")
    code, output = planted.run(*SETTINGS, FSDP)
    assert code == 0, output
    assert "steps 3 to 9" in output


@pytest.mark.parametrize(("strategy", "rank"), [("ddp", 1), ("fsdp", 0)])
def test_a_killed_process_is_named_with_its_signal(planted: Planted, strategy: str, rank: int) -> None:
    kill = f"if step == 4 and rank == {rank}: os.kill(os.getpid(), 9)"
    said, output = planted.fails(kill, f"trainer.strategy={strategy}")
    assert said == (
        f"bitnet_train: Process {rank} of 2 was killed by SIGKILL, which is what the system does when memory runs out: "
        "free memory or lower trainer.micro_batch or data.workers; runs/a/checkpoints/last.ckpt is intact, and the "
        "same command goes on from it."
    )
    assert quiet(output), output


def test_the_traceback_of_a_bug_is_shown_whichever_process_meets_it(planted: Planted) -> None:
    said, output = planted.fails("if step == 4 and rank == 1: raise RuntimeError('a bug')", code=1)
    assert said == "bitnet_train: process 1 failed with RuntimeError: a bug"
    assert output.count("Traceback") == 1
    assert "RuntimeError: a bug" in output
