"""Training on a mixture with stages: the windows of every step, resumed, cut otherwise, forked."""

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.__main__ import answer
from bitnet_train.data.config import BpeTokenizer, DataConfig, MixtureCorpus
from bitnet_train.data.mixture import Stage
from bitnet_train.data.prepare import prepare, shard_folder
from bitnet_train.data.shards import Manifest
from bitnet_train.errors import ConfigError
from bitnet_train.training.batch_warmup import BatchPlan
from bitnet_train.training.datamodule import ShardDataModule
from tests.training.conftest import SETTINGS, Workspace

STAGES = [Stage(0, (700, 300)), Stage(40, (200, 800)), Stage(90, (0, 1000))]
BATCH = 8


@pytest.fixture
def prepared(tmp_path: Path, texts: list[str]) -> tuple[DataConfig, Path, Manifest]:
    corpora: dict[str, Any] = {}
    for name, part in (("a", texts[:40]), ("b", texts[40:])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
        corpora[name] = {"corpus": "files", "path": str(path), "validation_every": 10}
    cfg = DataConfig(corpus=MixtureCorpus(corpora=corpora), tokenizer=BpeTokenizer(vocab_size=300), sequence_length=16)
    manifest = prepare(cfg, tmp_path / "shards")
    return cfg, shard_folder(cfg, tmp_path / "shards"), manifest


def module(
    prepared: tuple[DataConfig, Path, Manifest], micro: int = 4, stages: list[Stage] = STAGES, batch: int = BATCH
):  # type: ignore[no-untyped-def]
    return ShardDataModule(*prepared, BatchPlan(batch, micro, batch // micro), 3, stages)


def samples(data: ShardDataModule, steps: int) -> list[list[int]]:
    """The windows of the next ``steps`` steps, as the loader is told them."""
    sampler = data.train_dataloader().batch_sampler
    flat = itertools.chain.from_iterable(sampler)  # type: ignore[arg-type]
    return [list(itertools.islice(flat, data.plan.batch_sequences)) for _ in range(steps)]


def state_after(data: ShardDataModule, steps: int) -> dict[str, Any]:
    """The state that a checkpoint holds ``steps`` steps after the module's first."""
    data.trainer = type("Trainer", (), {"global_step": data._first_step + steps})()  # type: ignore[assignment]
    state = data.state_dict()
    data.trainer = None
    return state


@pytest.mark.parametrize("at", [1, 39, 40, 41, 95])
@pytest.mark.parametrize("micro", [1, 4, 8])
def test_a_resumed_run_draws_the_same_windows_whatever_its_micro_batch(prepared: Any, at: int, micro: int) -> None:
    whole = samples(module(prepared), 140)
    resumed = module(prepared, micro)
    resumed.load_state_dict(state_after(module(prepared), at))
    assert samples(resumed, 140 - at) == whole[at:]
    again = module(prepared, micro)
    again.load_state_dict(state_after(resumed, 20))
    assert samples(again, 10) == whole[at + 20 : at + 30]


def test_stages_begin_at_their_step(prepared: Any) -> None:
    data = module(prepared)
    first = len(data.sources["a"])
    from_a = [sum(i < first for i in step) / BATCH for step in samples(data, 140)]
    assert sum(from_a[:40]) / 40 == pytest.approx(0.7, abs=0.05)
    assert sum(from_a[40:90]) / 50 == pytest.approx(0.2, abs=0.05)
    assert from_a[90:] == [0.0] * 50
    assert data.mixture() == [
        "mixture from step 0: a 70.0%, b 30.0%",
        "mixture from step 40: a 20.0%, b 80.0%",
        "mixture from step 90: b 100.0%",
    ]
    b = sum(i >= first for step in samples(data, 140) for i in step) / len(data.sources["b"])
    assert f"b {b:.2f}" in data.epochs(140)


def test_a_fork_with_another_mixture_or_batch_repeats_no_window(prepared: Any) -> None:
    whole = samples(module(prepared), 60)
    state = state_after(module(prepared), 60)
    for fork in (module(prepared, stages=[Stage(0, (100, 900))]), module(prepared, batch=4)):
        fork.load_state_dict(state)
        steps = whole + samples(fork, 40)
        first = len(fork.sources["a"])
        for size, windows in (
            (first, [i for step in steps for i in step if i < first]),
            (len(fork.sources["b"]), [i for step in steps for i in step if i >= first]),
        ):
            for start in range(0, len(windows), size):
                epoch = windows[start : start + size]
                assert len(set(epoch)) == len(epoch)
        # What the fork saves takes it up again.
        resumed = module(prepared, stages=fork.stages, batch=fork.plan.batch_sequences)
        resumed.load_state_dict(state_after(fork, 10))
        assert samples(resumed, 30) == steps[70:]


def test_the_windows_are_those_of_the_corpora(prepared: Any) -> None:
    data = module(prepared)
    for index in (0, len(data.sources["a"]) - 1, len(data.sources["a"]), len(data.train_windows) - 1):
        name, own = ("a", index) if index < len(data.sources["a"]) else ("b", index - len(data.sources["a"]))
        assert torch.equal(data.train_windows[index], data.sources[name][own])


def test_validation_takes_its_share_of_every_corpus(prepared: Any) -> None:
    cfg, folder, manifest = prepared
    everything = module(prepared)
    count = {
        name: sum(batch[:, 1:].numel() for batch in loader) for name, loader in everything.validation_loaders().items()
    }
    assert count == {name: manifest.splits[f"val/{name}"]["tokens"] - 1 for name in ("a", "b")}
    cfg.validation_tokens = 90
    some = ShardDataModule(cfg, folder, manifest, BatchPlan(BATCH, 4, BATCH // 4), 3, STAGES)
    found = {name: sum(batch[:, 1:].numel() for batch in loader) for name, loader in some.validation_loaders().items()}
    total = manifest.splits["val"]["tokens"]
    assert found == {name: 90 * manifest.splits[f"val/{name}"]["tokens"] // total for name in ("a", "b")}


def test_a_corpus_without_a_window_is_refused(prepared: Any) -> None:
    cfg, folder, manifest = prepared
    cfg.sequence_length = manifest.splits["train/b"]["tokens"]
    with pytest.raises(ConfigError, match=r"training text of data\.corpus\.corpora\.b is \d+ tokens, less than one"):
        ShardDataModule(cfg, folder, manifest, BatchPlan(BATCH, 4, BATCH // 4), 3, STAGES)


def mixture_settings(folder: Path) -> tuple[str, ...]:
    own = "corpus: files, validation_every: 10"
    corpora = f"{{web: {{{own}, path: {folder}/corpus, weight: 3}}, code: {{{own}, path: {folder}/code}}}}"
    return "data=mixture", f"data.corpus.corpora={corpora}", "data.stages=[{from: 0.5, weights: {code: 1}}]"


@pytest.mark.usefixtures("one_thread")
def test_a_run_on_a_mixture_goes_on_bit_for_bit_across_a_stage(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace.folder)
    Path("code").mkdir()
    for i in range(20):
        Path(f"code/{i:02d}.txt").write_text(
            "".join(f"def function_{i}_{j}(x): return x + {i * j}\n" for j in range(20))
        )
    recipe = [s for s in SETTINGS if s != "data=files" and not s.startswith(("data.corpus", "samples", "checkpoint"))]
    recipe += ["samples.every_steps=null", "checkpoint.every_steps=3", "checkpoint.keep=9", "trainer.max_steps=12"]
    mixture = mixture_settings(workspace.folder)

    def run(*settings: str) -> tuple[int, str]:
        try:
            code = answer([*recipe, *settings])
        finally:
            torch.use_deterministic_algorithms(False)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    code, output = run(*mixture, "run_name=whole")
    assert code == 0, output
    assert "mixture from step 0: code 25.0%, web 75.0%" in output
    assert "mixture from step 6: code 100.0%" in output
    assert re.search(r"epochs: code \d\.\d\d, web 0\.\d\d", output)
    assert re.search(r"bits per byte \(code \d\.\d+, web \d\.\d+\)", output)
    # As a crash after step 3 leaves it.
    shutil.copytree("runs/whole", "runs/again")
    for step in (6, 9, 12):
        Path(f"runs/again/checkpoints/step-{step:08d}.ckpt").unlink()
    shutil.copyfile("runs/again/checkpoints/step-00000003.ckpt", "runs/again/checkpoints/last.ckpt")
    code, output = run(*mixture, "run_name=again")
    assert code == 0, output
    assert "steps 3 to 12" in output
    assert workspace.losses("again") == workspace.losses("whole")
    # Without the stage the first steps are the same and the others are not.
    assert run(*mixture[:2], "run_name=plain")[0] == 0
    one, two = ({k: v[0] for k, v in workspace.losses(name).items()} for name in ("whole", "plain"))
    assert [step for step in one if one[step] != two[step]] == [str(step) for step in range(7, 13)]
    # Another mixture on the way is refused by name.
    for settings, key in ((mixture[:2], "data.stages"), ((*mixture, "data.corpus.corpora.web.weight=2"), "web.weight")):
        code, output = run(*settings, "run_name=again", "trainer.max_steps=14")
        assert code == 2
        assert key in output
