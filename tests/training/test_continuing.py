"""A run that is killed, interrupted or terminated goes on as if nothing had happened."""

import re
import signal
import time

import pytest
import torch

from tests.training.conftest import Workspace


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(("clip=percentile", "clip.min_history=3"), id="dynamic-clip"),
        pytest.param(("trainer.micro_batch=2", "data.workers=2"), id="accumulation-and-workers"),
        pytest.param(
            (
                "optimizer=muon",
                "optimizer.layer_lr_decay=0.8",
                "trainer.batch_warmup=[{until:10,tokens:64},{until:50,tokens:128}]",
                "trainer.micro_batch=4",
                "data.workers=1",
            ),
            id="muon-and-batch-warm-up",
        ),
        # Two threads of compiled code: without deterministic mode they add the embedding's gradients in any order.
        pytest.param(("trainer.compile=true", "trainer.micro_batch=4"), id="compiled-two-threads"),
    ],
)
def test_kill_9_and_the_same_command_gives_the_losses_of_an_undisturbed_run(
    workspace: Workspace, variant: tuple[str, ...]
) -> None:
    # The run is killed as soon as step 12 is saved, and must not have ended by then.
    steps = 30 if "trainer.compile=true" in variant else 60
    settings = (*variant, f"trainer.max_steps={steps}")
    if "trainer.compile=true" in variant:
        workspace = Workspace(workspace.folder)
        workspace.threads = "2"
    code, output = workspace.run(*settings, "run_name=whole")
    assert code == 0, output
    process = workspace.start(*settings, "run_name=killed")
    workspace.signal_at(process, "killed", 12, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert (workspace.folder / "runs/killed/checkpoints/last.ckpt").exists()
    assert len(workspace.rows("killed")) < steps
    code, output = workspace.run(*settings, "run_name=killed")
    assert code == 0, output
    resumed_at = int(re.search(rf"steps (\d+) to {steps}", output)[1])  # type: ignore[index]
    assert 0 < resumed_at < steps
    assert workspace.losses("killed") == workspace.losses("whole")
    assert (workspace.folder / "runs/killed/samples.md").read_text() == (
        workspace.folder / "runs/whole/samples.md"
    ).read_text()


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGUSR2, 143)],
)
def test_a_signal_saves_and_stops_with_its_exit_code(
    workspace: Workspace, number: signal.Signals, exit_code: int
) -> None:
    settings = ("trainer.max_steps=400", "run_name=a", "checkpoint.every_steps=50", "data.workers=2")
    process = workspace.start(*settings)
    # Ctrl-C in a terminal and a cluster's signals reach the loader processes too.
    output = workspace.signal_at(process, "a", 50, number, group=True)
    assert process.returncode == exit_code, output
    assert "Traceback" not in output
    stopped_at = int(re.search(r"stopped at step (\d+)", output)[1])  # type: ignore[index]
    assert (workspace.folder / f"runs/a/checkpoints/step-{stopped_at:08d}.ckpt").exists()
    assert workspace.rows("a")[-1]["step"] == str(stopped_at)
    code, output = workspace.run(*settings[1:], f"trainer.max_steps={stopped_at + 1}")
    assert code == 0, output
    assert f"steps {stopped_at} to {stopped_at + 1}" in output


def test_a_finished_run_has_nothing_left_to_do_and_can_be_lengthened(workspace: Workspace) -> None:
    assert workspace.run("run_name=a", "trainer.max_steps=3", "schedule=constant")[0] == 0
    before = workspace.losses("a")
    code, output = workspace.run("run_name=a", "trainer.max_steps=3", "schedule=constant")
    assert code == 0
    assert "nothing left to train" in output
    assert workspace.losses("a") == before
    assert workspace.run("run_name=a", "trainer.max_steps=7", "schedule=constant")[0] == 0
    assert workspace.run("run_name=b", "trainer.max_steps=7", "schedule=constant")[0] == 0
    longer, whole = workspace.losses("a"), workspace.losses("b")
    # Step 3 was validated as the last step of the short run; the rest is the same run.
    assert {k: v[0] for k, v in longer.items()} == {k: v[0] for k, v in whole.items()}


def test_a_change_of_what_is_computed_is_refused_by_name(workspace: Workspace) -> None:
    assert workspace.run("run_name=a", "trainer.max_steps=2")[0] == 0
    code, output = workspace.run("run_name=a", "trainer.max_steps=4", "optimizer.lr=1e-4")
    assert code == 2
    assert "optimizer.lr" in output
    assert "Traceback" not in output


def test_a_fork_starts_from_another_runs_checkpoint(workspace: Workspace) -> None:
    assert workspace.run("run_name=a", "trainer.max_steps=6", "schedule=constant")[0] == 0
    fork = ("run_name=b", "trainer.max_steps=9", "schedule=constant", "optimizer.lr=1e-4")
    code, output = workspace.run(*fork, "resume.from=runs/a@3")
    assert code == 0, output
    assert "steps 3 to 9" in output
    assert [row["step"] for row in workspace.rows("b")] == [str(i) for i in range(4, 10)]
    assert workspace.rows("b")[0]["lr"] == "0.0001"
    code, output = workspace.run("run_name=d", "trainer.max_steps=6", "resume.from=runs/a", "schedule=constant")
    assert code == 2
    assert "is at step 6, and trainer.max_steps=6 leaves nothing to train" in output
    assert not (workspace.folder / "runs/d/config.yaml").exists()
    code, output = workspace.run(*fork[1:], "run_name=c", "resume.from=runs/a@4")
    assert code == 2
    assert "steps saved there: 3, 6" in output


def test_another_micro_batch_on_the_way_changes_nothing_but_rounding(workspace: Workspace) -> None:
    settings = ("schedule=constant", "trainer.max_steps=7", "trainer.micro_batch=4", "checkpoint.every_steps=null")
    assert workspace.run(*settings, "run_name=whole")[0] == 0
    for first, then in ((8, 2), (2, 4)):
        run = f"run_name={first}-{then}"
        short = (*settings[:1], "trainer.max_steps=3", f"trainer.micro_batch={first}")
        assert workspace.run(*short, run)[0] == 0
        code, output = workspace.run(*settings[:2], f"trainer.micro_batch={then}", run)
        assert code == 0, output
        whole, changed = workspace.rows("whole"), workspace.rows(run.removeprefix("run_name="))
        assert [row["step"] for row in changed] == [row["step"] for row in whole]
        for a, b in zip(whole, changed, strict=True):
            # Rounding flips codes of weights and of int8 gradients, which the gradient norm shows more than the loss.
            for column, slack in (("train/loss", 0.02), ("grad_norm", 0.1)):
                assert float(a[column]) == pytest.approx(float(b[column]), rel=slack), (first, then, a["step"], column)


def test_touched_or_moved_text_that_is_the_same_continues_after_preparing_again(workspace: Workspace) -> None:
    assert workspace.run("run_name=a", "trainer.max_steps=2", "schedule=constant")[0] == 0
    (workspace.folder / "corpus/00.txt").touch()
    more = ("run_name=a", "trainer.max_steps=3", "schedule=constant")
    code, output = workspace.run(*more)
    assert code == 2
    assert "prepare again with command=prepare data.rebuild=true" in output
    assert workspace.run(*more, "command=prepare", "data.rebuild=true")[0] == 0
    code, output = workspace.run(*more)
    assert code == 0, output
    (workspace.folder / "corpus/00.txt").write_text("another text\n" * 50)
    assert workspace.run(*more, "command=prepare", "data.rebuild=true")[0] == 0
    code, output = workspace.run("run_name=a", "trainer.max_steps=4", "schedule=constant")
    assert code == 2
    assert "trained on other token shards" in output


def test_a_fork_that_does_not_fit_is_refused_and_leaves_no_configuration(workspace: Workspace) -> None:
    assert workspace.run("run_name=a", "trainer.max_steps=3")[0] == 0
    code, output = workspace.run("run_name=b", "trainer.max_steps=6", "resume.from=runs/a", "model.ffn=96")
    assert code == 2
    assert "is of another model: layers.0.mlp.gate_proj.weight" in output
    assert not (workspace.folder / "runs/b/config.yaml").exists()
    code, output = workspace.run("run_name=b", "trainer.max_steps=6", "resume.from=runs/a", "clip=percentile")
    assert code == 0, output
    code, output = workspace.run("run_name=a", "trainer.max_steps=6", "resume.from=runs/b")
    assert code == 2
    assert "checkpoints of its own" in output
    code, output = workspace.run("run_name=a", "trainer.max_steps=6", "resume.from=runs/a@3")
    assert code == 2
    assert "own folder" in output


def test_a_fork_counts_its_samples_from_where_it_began(workspace: Workspace) -> None:
    assert workspace.run("run_name=a", "trainer.max_steps=3")[0] == 0
    assert workspace.run("run_name=b", "trainer.max_steps=6", "resume.from=runs/a", "trainer.batch_tokens=512")[0] == 0
    saved = torch.load(workspace.folder / "runs/b/checkpoints/last.ckpt", weights_only=True)
    assert saved["ShardDataModule"]["consumed"] == 3 * 8 + 3 * 16


def test_a_second_interrupt_stops_at_once_with_130(workspace: Workspace) -> None:
    # The checkpoint is the first step's; the next one takes some seconds, in which both interrupts come.
    process = workspace.start(
        "run_name=a", "trainer.max_steps=50", "trainer.batch_tokens=262144", "trainer.micro_batch=64",
        "checkpoint.every_steps=1",
    )  # fmt: skip
    checkpoint = workspace.folder / "runs/a/checkpoints/step-00000001.ckpt"
    workspace._wait(lambda: checkpoint.exists() or process.poll() is not None)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    assert "Traceback" not in output


def test_a_folder_in_use_is_refused(workspace: Workspace) -> None:
    process = workspace.start("run_name=a", "trainer.max_steps=100000", "data.workers=2")
    try:
        workspace._wait(lambda: (workspace.folder / "runs/a/checkpoints/last.ckpt").exists())
        code, output = workspace.run("run_name=a", "trainer.max_steps=100000", "data.workers=2")
        assert code == 2
        assert f"in use by process {process.pid}" in output
        assert "Traceback" not in output
    finally:
        process.kill()
        process.communicate()
    # The lock went with the process, although its loader processes may live a moment longer.
    code, output = workspace.run("run_name=a", "trainer.max_steps=1", "data.workers=2")
    assert code == 0, output


def test_edited_or_truncated_shards_are_refused(workspace: Workspace) -> None:
    assert workspace.run("run_name=a", "trainer.max_steps=2")[0] == 0
    shard = next((workspace.folder / "data").rglob("train-00000.npy"))
    original = shard.read_bytes()
    for damaged in (original[:-2], original[:-2] + b"\0\1"):
        shard.write_bytes(damaged)
        code, output = workspace.run("run_name=a", "trainer.max_steps=4")
        assert code == 2
        assert str(shard.name) in output
        assert "Traceback" not in output


def test_training_that_diverges_stops_with_code_3_and_keeps_the_last_good_checkpoint(workspace: Workspace) -> None:
    assert workspace.run("run_name=a", "trainer.max_steps=3")[0] == 0
    code, output = workspace.run(
        "run_name=b",
        "trainer.max_steps=60",
        "optimizer.lr=1e38",
        "schedule.warmup=0",
        "clip=none",
        "resume.from=runs/a",
    )
    assert code == 3, output
    assert "Traceback" not in output
    assert not list((workspace.folder / "runs/b/checkpoints").glob("step-0000006*.ckpt"))


def test_wandb_without_a_key_is_offline_and_says_so(workspace: Workspace) -> None:
    code, output = workspace.run("run_name=a", "trainer.max_steps=2", "logger=wandb")
    assert code == 0, output
    assert "offline, because no API key is configured" in output
    assert "wandb sync" in output
    assert list((workspace.folder / "runs/a/wandb").glob("offline-run-*"))
    assert len(workspace.rows("a")) == 2
