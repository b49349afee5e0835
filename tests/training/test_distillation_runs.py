"""A student learns from a dense run and from a checkpoint of transformers, on the command line."""

import json
import shutil

import pytest
import torch

from bitnet_train.data.tokenizer import load_tokenizer
from tests.training.conftest import InProcess, Workspace
from tests.training.test_distillation import llama

NAMES = ("train/loss", "loss/total", "loss/distillation", "grad_norm", "codes/flips")
ALL_KINDS = ("loss.hidden=0.1", "loss.relations=1", "loss.relation_heads=2")


@pytest.fixture
def here(workspace: Workspace) -> Workspace:
    return InProcess(workspace.folder)


def figures(workspace: Workspace, run: str) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in NAMES) for row in workspace.rows(run)]


def test_a_ternary_run_learns_from_its_dense_twin(here: Workspace) -> None:
    steps = ("schedule=constant", "trainer.max_steps=6")
    code, output = here.run("quant=none", "run_name=dense", "trainer.max_steps=20")
    assert code == 0, output
    distil = ("loss=distillation", "loss.teacher=runs/dense", *ALL_KINDS, *steps)
    code, output = here.run(*distil, "run_name=whole")
    assert code == 0, output
    assert "teacher: step 20 of runs/dense" in output
    # What is logged adds up, and the student gets nearer to its teacher.
    rows = here.rows("whole")
    for row in rows:
        total = float(row["train/loss"]) + float(row["loss/distillation"])
        assert float(row["loss/total"]) == pytest.approx(total, rel=1e-5)
    assert float(rows[-1]["loss/distillation"]) < float(rows[0]["loss/distillation"])
    # The first loss is the plain run's, the weights after it are not.
    assert here.run("run_name=plain", *steps)[0] == 0
    plain = here.rows("plain")
    assert plain[0]["train/loss"] == rows[0]["train/loss"]
    assert plain[1]["train/loss"] != rows[1]["train/loss"]
    assert not plain[0]["loss/total"]
    session = json.loads((here.folder / "runs/whole/provenance.json").read_text())["sessions"][0]
    teacher = session["chosen"]["teacher"]
    assert (teacher["source"], teacher["kind"], teacher["step"]) == ("runs/dense", "run", 20)
    assert len(teacher["config_sha256"]) == 64
    state = torch.load(here.folder / "runs/whole/checkpoints/last.ckpt", weights_only=True)
    assert not any("teacher" in name for name in state["state_dict"])

    # Continued, it is the same bit for bit.
    assert here.run(*distil, "run_name=cut", "trainer.max_steps=3")[0] == 0
    code, output = here.run(*distil, "run_name=cut", "trainer.micro_batch=auto", "trainer.max_steps=3")
    assert "nothing left to train" in output
    assert here.run(*distil, "run_name=cut")[0] == 0
    assert figures(here, "cut") == figures(here, "whole")
    # A teacher that trains on is another one; one that is gone is named.
    assert here.run("quant=none", "run_name=dense", "trainer.max_steps=22")[0] == 0
    code, output = here.run(*distil, "run_name=cut", "trainer.max_steps=8")
    assert code == 2
    assert "another step, 20 then and 22 now" in output
    shutil.rmtree(here.folder / "runs/dense")
    code, output = here.run(*distil, "run_name=cut", "trainer.max_steps=8")
    assert code == 2
    assert "loss.teacher=runs/dense does not exist" in output
    assert "Traceback" not in output
    # Everything else can be done with the run without its teacher.
    code, output = here.run("command=export", "run=runs/whole", "export.formats=[packed]")
    assert code == 0, output
    assert "runs/dense" in (here.folder / "runs/whole/export/packed/README.md").read_text()
    assert here.run("command=report", "run=runs/whole")[0] == 0
    assert "Parts of the loss" in (here.folder / "runs/whole/report.html").read_text()


def test_a_run_learns_from_a_llama_of_transformers(here: Workspace) -> None:
    assert here.run("command=prepare")[0] == 0
    shards = next(here.folder.glob("data/**/tokenizer.json")).parent
    folder = llama(here.folder / "llama", load_tokenizer(shards), vocab_size=320, num_hidden_layers=4)
    settings = (
        "loss=distillation", f"loss.teacher={folder}", "loss.hidden=0.1", "loss.relations=1",
        "data.attend_within_documents=true", "trainer.max_steps=4", "trainer.micro_batch=auto", "schedule=constant",
    )  # fmt: skip
    code, output = here.run(*settings, "run_name=whole")
    assert code == 0, output
    assert f"teacher: LlamaForCausalLM {folder}" in output
    assert "micro-batch: " in output
    assert here.run(*settings[4:], "loss=cross_entropy", "run_name=plain")[0] == 0
    taught, plain = here.rows("whole"), here.rows("plain")
    assert taught[0]["train/loss"] == plain[0]["train/loss"]
    assert taught[1]["train/loss"] != plain[1]["train/loss"]
    assert all(float(row["loss/distillation"]) > 0 for row in taught)
    assert here.run(*settings, "run_name=cut", "trainer.max_steps=2")[0] == 0
    assert here.run(*settings, "run_name=cut")[0] == 0
    assert figures(here, "cut") == figures(here, "whole")


def test_mistakes_are_one_sentence_before_anything_is_prepared(here: Workspace) -> None:
    for settings, sentence in (
        ((), "loss.teacher is not set"),
        (("loss.teacher=runs/none",), "loss.teacher=runs/none does not exist"),
        (("loss.teacher=a", "loss.relations=1", "loss.relation_heads=3"), "does not divide the widths of the model"),
        (("loss.teacher=a", "loss.relations=1", "loss.layer=2"), "loss.layer names block 2, and model.layers=2"),
        (("loss.teacher=a", "command=benchmark"), "command=benchmark times steps without a teacher"),
    ):
        code, output = here.run("loss=distillation", *settings, "run_name=x")
        assert code == 2, output
        assert sentence in output
        assert "Traceback" not in output
    assert not (here.folder / "data").exists()
    code, output = here.run("loss=distillation", "loss.teacher=a", "command=estimate")
    assert code == 0, output
    assert "teacher" in output
