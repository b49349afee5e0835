"""``init.from`` on the command line: saved as a run, exported again, trained on, continued."""

from tests.training.conftest import Workspace


def test_a_run_starts_from_an_export_and_goes_on(workspace: Workspace) -> None:
    assert workspace.run("run_name=a", "trainer.max_steps=6")[0] == 0
    code, output = workspace.run("command=export", "run=runs/a", "export.formats=[hf-master]")
    assert code == 0, output
    start = "init.from=runs/a/export/hf-master"
    code, output = workspace.run(start, "run_name=b", "trainer.max_steps=0")
    assert code == 0, output
    assert "init: master weights of runs/a/export/hf-master" in output
    code, output = workspace.run("command=export", "run=runs/b", "export.formats=[hf-master]")
    assert code == 0, output
    paths = [workspace.folder / "runs" / run / "export/hf-master/model.safetensors" for run in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    code, output = workspace.run(start, "run_name=b", "trainer.max_steps=0")
    assert code == 0
    assert "nothing left to train" in output
    # The same run trains on from the imported weights, and is continued like any other.
    code, output = workspace.run(start, "run_name=b", "trainer.max_steps=3", "schedule=constant")
    assert code == 2
    assert "schedule" in output
    code, output = workspace.run(start, "run_name=b", "trainer.max_steps=3")
    assert code == 0, output
    assert "steps 0 to 3" in output
    assert float(workspace.rows("b")[0]["train/loss"]) < float(workspace.rows("a")[0]["train/loss"])
    code, output = workspace.run(start, "run_name=b", "trainer.max_steps=5")
    assert code == 0, output
    assert "steps 3 to 5" in output
    for settings, sentence in (
        (("init.from=runs/a", "model.layers=3"), "is of another model: set model.layers=2."),
        (
            ("init.from=runs/a", "data.tokenizer.vocab_size=400"),
            "is of another model: set model.vocab=320 data.tokenizer.vocab_size=320.",
        ),
        (("trainer.max_steps=0",), "or 0 with init.from="),
    ):
        code, output = workspace.run("run_name=e", *settings)
        assert code == 2
        assert sentence in output
        assert "Traceback" not in output


def test_another_tokenizer_is_refused_before_anything_is_prepared(workspace: Workspace) -> None:
    assert workspace.run("run_name=a", "trainer.max_steps=1")[0] == 0
    data = workspace.folder / "data"
    before = sorted(data.iterdir())
    other = ("run_name=b", "trainer.max_steps=1", "data.tokenizer.end_of_text='<|stop|>'")
    taught = ("loss=distillation", "loss.teacher=runs/a")
    for settings, key in (
        (("init.from=runs/a",), "init.from"),
        (("init.from=runs/a", "data.prepare.processes=2"), "init.from"),
        (taught, "loss.teacher"),
    ):
        code, output = workspace.run(*other, *settings)
        assert code == 2
        assert f"{key}=runs/a was trained with another tokenizer: use its own" in output
        assert "Traceback" not in output
        # Work that other processes would share begins with a folder for its lock.
        assert [path for path in sorted(data.iterdir()) if not path.name.endswith(".parts")] == before
    # Shards that are there already change nothing.
    assert workspace.run(*other, "command=prepare")[0] == 0
    code, output = workspace.run(*other, "init.from=runs/a")
    assert code == 2
    assert "init.from=runs/a was trained with another tokenizer" in output
