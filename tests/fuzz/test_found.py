"""What the fuzz has found: each was a traceback, a hang, or a message that says nothing."""

from pathlib import Path

import pytest

import bitnet_train.commands as commands
from tests.fuzz.harness import defect, run

FOUND = [
    # Values of other settings in the place of lists and parts.
    (
        ["weight_decay_schedule=two_stage", "weight_decay_schedule.stages=${seed}"],
        "stages is ${seed}, which stands for",
    ),
    (
        ["quant.overrides=[{pattern:x,scheme:float}]", "optimizer.groups=${quant.overrides}"],
        "optimizer.groups is ${quant",
    ),
    (["trainer=${seed}"], "trainer is ${seed}, which stands for something else"),
    # OmegaConf takes a list for a number inside of lists.
    (["benchmark.tokens=[[32,32]]"], "benchmark.tokens[0] must be a whole number, not [32, 32]."),
    (["optimizer.betas=[[0.9],0.99]"], "optimizer.betas[0] must be a number, not [0.9]."),
    (["benchmark.shapes=[32,32]"], "benchmark.shapes=[32,32] does not fit: "),
    (["samples.prompts=[{a:1}]"], "samples.prompts[0] must be a text"),
    # Numbers that took hours or overflowed later.
    (["model.layers=100000000"], "model.layers is 100000000; it must be at most 10,000."),
    (["trainer.max_steps=99999999999999999999999"], "which does not fit into 64 bits"),
    (["seed=99999999999999999999999"], "which does not fit into 64 bits"),
    (["checkpoint.every_minutes=nan"], "checkpoint.every_minutes is nan; it must be a finite number."),
    (["model.norm_eps=nan"], "norm_eps is nan"),
    (["samples.temperature=inf"], "samples.temperature is inf"),
    # What Hydra answers with ValueError and OSError.
    (["++generate.stop.more=[]"], "The configuration cannot be composed: invalid literal"),
    (["hydra.run.dir=/proc/x"], "The configuration cannot be composed: [Errno 2]"),
    # Messages that said nothing.
    (["export.dtype=100.0"], "export.dtype must be one of float32, bfloat16, not '100.0'."),
    (["-m", "seed=glob(*)"], "glob() is not understood; list the values"),
    (["samples.temperature=" + "x" * 5000], "xxxx..."),
]


@pytest.fixture(autouse=True)
def _only_composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "run", lambda _: 0)


@pytest.mark.parametrize(("words", "said"), FOUND, ids=[" ".join(words)[:60] for words, _ in FOUND])
def test_is_answered_with_one_sentence(words: list[str], said: str) -> None:
    ended = run(["+recipe=tiny", *words])
    assert ended.code == 2
    assert not defect(ended)
    assert len(ended.sentences) == 1
    assert said in ended.sentences[0]


def test_a_flag_behind_the_settings_takes_none_of_them_for_its_value() -> None:
    for line in (["+recipe=tiny", "seed=3", "--info"], ["--info", "+recipe=tiny"], ["+recipe=tiny", "--cfg", "job"]):
        ended = run(line)
        assert ended.code in (0, 2), line
        assert not defect(ended), line


def test_a_number_under_defaults(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [3]\nseed: 2\n")
    ended = run(["--config-dir", str(tmp_path), "+recipe=mine"])
    assert ended.code == 2
    assert not defect(ended)
    assert "in defaults : int" in ended.sentences[0]
