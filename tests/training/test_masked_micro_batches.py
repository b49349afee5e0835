"""Conversations, of which only the answers are learnt: however a step is cut, every learnt token counts the same."""

import json

import pytest
import torch

from bitnet_train.training.losses.shares import share_of_targets
from tests.conftest import make_text
from tests.training.conftest import InProcess, Workspace

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
SETTINGS = (
    "data=chat", "data/tokenizer=bpe", "data.corpus.validation_every=10", "data.tokenizer.vocab_size=320", "quant=none",
    "trainer.precision=32-true", "schedule=constant", "optimizer.lr=1e-3", "loss.z_loss=1e-3", "trainer.max_steps=6",
    "trainer.validate_every=6", "samples.every_steps=null", "checkpoint.every_steps=null",
)  # fmt: skip
DDP, CUT, FSDP = "trainer.devices=2", "trainer.micro_batch=2", "trainer.strategy=fsdp"


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("talks")
    lines = []
    for i in range(60):
        # Answers from a word to half a page: micro-batches hold very different numbers of learnt tokens.
        asked, answered = make_text(i), make_text(100 + i)[: 4 if i % 3 else 400]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    (folder / "corpus").write_text("")
    (folder / "talks.jsonl").write_text("".join(lines))
    (folder / "template").write_text(TEMPLATE)
    workspace = InProcess(folder)
    for name, reduction in (("whole-mean", "mean"), ("whole-sum", "sum")):
        go(workspace, name, f"loss.reduction={reduction}")
    return workspace


def go(talks: Workspace, name: str, *settings: str) -> None:
    where = (f"data.corpus.path={talks.folder}/talks.jsonl", f"data.corpus.template={talks.folder}/template")
    if DDP in settings:
        talks = Workspace(talks.folder)
    code, output = talks.run(*SETTINGS, *where, f"run_name={name}", *settings)
    assert code == 0, output


@pytest.mark.parametrize(
    ("reduction", "cut"),
    [
        ("mean", (CUT,)),
        ("sum", (CUT,)),
        ("mean", ("trainer.micro_batch=1",)),
        ("sum", ("trainer.micro_batch=1",)),
        ("mean", (DDP, CUT)),
        ("sum", (DDP, CUT, FSDP)),
        pytest.param("mean", (DDP,), marks=pytest.mark.slow),
        pytest.param("sum", (DDP,), marks=pytest.mark.slow),
        pytest.param("sum", (DDP, CUT), marks=pytest.mark.slow),
        pytest.param("mean", (DDP, CUT, FSDP), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_step_is_the_same_however_it_is_cut(talks: Workspace, cut: tuple[str, ...], reduction: str) -> None:
    name = "+".join(part.partition(".")[2] for part in cut) + reduction
    go(talks, name, *cut, f"loss.reduction={reduction}")
    wanted, found = talks.rows(f"whole-{reduction}"), talks.rows(name)
    assert len(found) == len(wanted) == 6
    for mine, theirs in zip(found, wanted, strict=True):
        for column in ("train/loss", "grad_norm", "loss/z", "loss/total", "val/loss"):
            if theirs[column]:
                assert float(mine[column]) == pytest.approx(float(theirs[column]), rel=2e-5), (mine["step"], column)


def test_what_a_teacher_says_counts_for_the_learnt_tokens_alone(talks: Workspace) -> None:
    taught = ("loss=distillation", "loss.teacher=runs/whole-mean", "loss.hidden=30", "loss.relations=300", "seed=5")
    columns = ("train/loss", "loss/distillation", "loss/total", "grad_norm")
    for name, cut in (("taught", "null"), ("taught-in-parts", "1")):
        go(talks, name, *taught, f"trainer.micro_batch={cut}")
    for mine, theirs in zip(talks.rows("taught-in-parts"), talks.rows("taught"), strict=True):
        for column in columns:
            assert float(mine[column]) == pytest.approx(float(theirs[column]), rel=2e-5), (mine["step"], column)


def test_the_share_of_a_micro_batch() -> None:
    ids = torch.tensor([[[5, 5, 5, 5, 5], [-100, 5, -100, -100, -100]], [[5] * 5, [-100, 5, 5, -100, 7]]])
    assert float(share_of_targets(ids)) == 0.5
    assert float(share_of_targets(torch.tensor([[[5, 5], [-100, -100]]]))) == 0
    assert float(share_of_targets(torch.tensor([[5, 6, 7]]))) == 1
