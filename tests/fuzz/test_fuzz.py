"""Whatever is typed, the command line ends with a composed configuration or exit code 2 and one clear message."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bitnet_train.__main__ as entry
import bitnet_train.commands as commands
import bitnet_train.commands.submit as submit
from bitnet_train.config import Config
from tests.composing import CATALOGUE
from tests.fuzz.harness import Ended, defect, run
from tests.fuzz.mutations import Mutator, words

RUN_AS = (
    "model.layers=2", "trainer.max_steps=2", "trainer.validate_every=2", "trainer.compile=false",
    "samples.every_steps=null", "checkpoint.every_steps=null", "telemetry.every_steps=null",
    "trainer.accelerator=cpu", "logger=csv",
)  # fmt: skip
TINY_TEXT = (
    "data.corpus.path=TEXTS", "data.sequence_length=16", "data.corpus.validation_every=10",
    "data.tokenizer.vocab_size=300", "model.hidden=32", "model.heads=2", "model.kv_heads=2",
    "model.ffn=64", "trainer.batch_tokens=64",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    # What does not change from line to line and takes a quarter of the time: reading the recipes that are shipped.
    register = entry.register
    monkeypatch.setattr(entry, "register", lambda folder: CATALOGUE if folder is None else register(folder))
    # Composing makes millions of small objects, and every look at all of torch's takes its time.
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def fuzz(seed: int, count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Exit code -> how many of ``count`` command lines ended so; commands themselves are not run."""
    reached: list[Config] = []
    monkeypatch.setattr(commands, "run", lambda cfg: reached.append(cfg) or 0)
    monkeypatch.setattr(submit, "run", lambda cfg, *_: reached.append(cfg) or 0)
    mutator, wrong = Mutator(seed, folder / "recipes"), []
    codes = dict.fromkeys((0, 2), 0)
    for _ in range(count):
        line = mutator.line()
        ended = run(line)
        if found := defect(ended):
            wrong.append(f"{words(line)}\n    {found}")
        else:
            assert ended.code is not None
            codes[ended.code] += 1
    assert not wrong, "\n".join(wrong)
    assert len(reached) > count // 50, "hardly anything composes: the mutations are too wild to find much"
    assert {path.name for path in folder.iterdir()} <= {"recipes"}, "composing leaves something behind"
    return codes


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_mutations_are_composed_or_refused(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = fuzz(2, count, tmp_path, monkeypatch)
    assert codes[2] > count / 3
    assert codes[0] > count / 15


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_3000_mutations_are_composed_or_refused(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz(seed, 300, tmp_path, monkeypatch)


@pytest.mark.parametrize("count", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_what_composes_is_trained_or_stops_with_a_sentence(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(f"text {i}: the quick brown fox jumps over {i * i} lazy dogs\n" * 20)
    plain, composed = commands.run, []
    mutator, ended = Mutator(2, tmp_path / "recipes"), dict.fromkeys((0, 2, 3), 0)
    while sum(ended.values()) < count:
        line = _runnable(mutator, str(texts))
        monkeypatch.setattr(commands, "run", lambda cfg: composed.append(cfg) or 0)
        before = len(composed)
        if defect(run(line)) or len(composed) == before:
            continue
        monkeypatch.setattr(commands, "run", plain)
        torch.set_num_threads(1)
        result: Ended = run([*line, f"run_name=run{sum(ended.values())}"])
        assert not defect(result, (0, 2, 3)), f"{words(line)}\n{defect(result, (0, 2, 3))}"
        assert result.code is not None
        # A sweep says one for each of its runs.
        assert result.code == 0 or len(result.sentences) == 1 or "-m" in line, result.errors
        ended[result.code] += 1
    assert ended[0] >= 0.4 * count, ended


def _runnable(mutator: Mutator, texts: str) -> list[str]:
    """A mutated recipe that needs nothing, with its model made tiny."""
    recipe = mutator.random.choice(("tiny", "tiny", "tiny", "digits_mlp", "digits_vit"))
    chosen = [f"+recipe={recipe}"]
    if recipe == "tiny":
        chosen.append("data=files")
    line = [*chosen, *(word for _ in range(2) for word in mutator.mutation(chosen))]
    own = [word.replace("TEXTS", texts) for word in TINY_TEXT] if recipe == "tiny" else ["data.batch_size=16"]
    return [*line, *(own if recipe == "tiny" else [*own, "model.hidden=32"]), *RUN_AS]
