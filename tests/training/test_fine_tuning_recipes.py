"""The recipes that start from a model, one after the other as their comments say, on a model of a few numbers."""

import csv
import json
from pathlib import Path

import pytest

from bitnet_train.data.tokenizer import load_tokenizer
from tests.fuzz.harness import run
from tests.training.conftest import write_corpus
from tests.training.test_masked_micro_batches import TEMPLATE

SHAPE = ("model.hidden=32", "model.layers=2", "model.heads=2", "model.kv_heads=2", "model.ffn=64")
SHORT = (
    "data.sequence_length=32", "trainer.batch_tokens=256", "trainer.compile=false", "trainer.log_every=1",
    "trainer.validate_every=20", "samples.every_steps=null", "checkpoint.every_steps=null",
    "telemetry.every_steps=null",
)  # fmt: skip
# Another text than the dense model's: its tokenizer is taken, not a new one.
OTHER = ("data.corpus.path=other", "data.tokenizer.vocab_size=320", "data.corpus.validation_every=10")
TEXT = ("data.corpus.path=corpus", "data.tokenizer.vocab_size=320", "data.corpus.validation_every=10")


def train(recipe: str, name: str, steps: int, *settings: str) -> list[dict[str, str]]:
    ended = run([f"+recipe={recipe}", f"run_name={name}", f"trainer.max_steps={steps}", *SHAPE, *SHORT, *settings])
    assert ended.code == 0, ended.errors
    with Path("runs", name, "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``runs/dense``: a dense model without sub-norms, as one meets them."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    (tmp_path / "other").mkdir()
    lines = (json.dumps({"text": f"number {i} is {i * i * 7}, {'odd' if i % 2 else 'even'} " * 9}) for i in range(80))
    (tmp_path / "other" / "texts.jsonl").write_text("\n".join(lines) + "\n")
    plain = ("quant=none", "model.norms=pre", "init.sub_norm_gain=1", "data=files")
    train("tiny", "dense", 40, *TEXT, *plain, "optimizer=adamw", "optimizer.lr=1e-2")


@pytest.mark.usefixtures("dense")
def test_the_three_stages_of_bitdistill() -> None:
    continued = train("distill_continue", "continued", 20, "init.from=runs/dense", *OTHER)
    assert float(continued[-1]["train/loss"]) < float(continued[0]["train/loss"]) + 1
    assert float(continued[-1]["codes/zeros"]) > 0
    task = train("distill", "student", 6, "init.from=runs/continued", "loss.teacher=runs/dense", *OTHER,
                 "trainer.micro_batch=null")  # fmt: skip
    # The model of stage 2 goes on, and learns from the dense one.
    assert float(task[0]["train/loss"]) == pytest.approx(float(continued[-1]["train/loss"]), abs=1)
    assert float(task[-1]["loss/distillation"]) < float(task[0]["loss/distillation"])


@pytest.mark.usefixtures("dense")
def test_fine_tuning_and_conversations() -> None:
    tuned = train("finetune", "tuned", 4, "init.from=runs/dense", "init.sub_norms=calibrate", *OTHER)
    rates = [float(row["lr"]) for row in tuned]
    assert max(rates) <= 2e-5
    talks = [
        {"messages": [{"role": "user", "content": f"line {i}"}, {"role": "assistant", "content": f"abc {i * i}"}]}
        for i in range(80)
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    Path("template").write_text(TEMPLATE)
    tokenizer = load_tokenizer(Path("runs/tuned/tokenizer"))
    source = (
        f"data.tokenizer.vocab_size={tokenizer.vocab_size}",
        "data.corpus.path=chats.jsonl", "data.corpus.template=template", "data.corpus.validation_every=10",
    )  # fmt: skip
    talked = train("sft", "talked", 20, "init.from=runs/tuned", *source)
    # Summed over the learnt tokens of a step, which are fewer than its tokens.
    first = talked[0]
    assert 1 < float(first["loss/total"]) / float(first["train/loss"]) < 256
    assert float(talked[-1]["train/loss"]) < float(first["train/loss"])
    # The tokenizer's one special token begins a conversation and ends its turns.
    apart = ["data.attend_within_documents=true", "run_name=apart", "init.from=runs/tuned", "trainer.max_steps=2"]
    ended = run(["+recipe=sft", *SHAPE, *SHORT, *source, *apart])
    assert ended.code == 2
    assert "which also ends turns in the chat template" in ended.errors


def test_from_16_to_1_58_bits_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path)
    settings = ("data=files", *TEXT)
    switched = train("continue_16_to_1_58", "switched", 20, *settings)
    ternary = train("small", "ternary", 20, *settings)
    floats = train("small", "floats", 20, *settings, "quant=none")
    same = [a["train/loss"] == b["train/loss"] for a, b in zip(switched, floats, strict=True)]
    assert same == [True] * 4 + [False] * 16  # a fifth of the run is float
    assert switched[0]["train/loss"] != ternary[0]["train/loss"]
    assert float(switched[-1]["codes/flips"]) < float(switched[0]["codes/flips"])
