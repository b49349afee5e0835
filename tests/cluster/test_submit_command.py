"""``command=submit``: what is shown, where it is kept, and what sbatch gets."""

import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from bitnet_train.__main__ import answer
from bitnet_train.config import to_yaml
from tests.composing import compose_config, fresh_recipes

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)

    def execute(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = answer(list(arguments))
        out = capsys.readouterr()
        return code, out.out, out.err

    with fresh_recipes():
        yield execute


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that takes the job and notes what it was given; the folder of the notes."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    program = bin_folder / "sbatch"
    program.write_text(f'#!/bin/bash\necho "$@" >> {bin_folder}/asked\nenv >> {bin_folder}/env\necho "41;cluster"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    return bin_folder


def command_of(script: Path) -> list[str]:
    """The words behind python -m bitnet_train."""
    text = script.read_text().replace("\\\n", "")
    line = next(line for line in text.splitlines() if line.startswith("srun "))
    words = shlex.split(line.removesuffix(" || status=$?"))
    return words[words.index("bitnet_train") + 1 :]


def test_the_script_is_shown_and_kept_and_not_submitted(run: Run, tmp_path: Path, sbatch: Path) -> None:
    code, out, err = run("+recipe=tiny", "command=submit", "optimizer.lr=1e-3", "cluster.partition=gpu", "seed=3")
    assert (code, err) == (0, "")
    script = tmp_path / "runs/tiny/train.sbatch"
    assert script.read_text() in out
    assert "not submitted: add submit=true, or run sbatch runs/tiny/train.sbatch" in out
    lines = script.read_text().splitlines()
    for line in ("--job-name=tiny", "--partition=gpu", f"--chdir={tmp_path}", "--time=24:00:00", "--requeue",
                 f"--output={tmp_path}/runs/tiny/slurm-%j.out", "--open-mode=append", "--signal=USR1@120"):  # fmt: skip
        assert f"#SBATCH {line}" in lines
    assert command_of(script) == ["+recipe=tiny", "optimizer.lr=1e-3", "cluster.partition=gpu", "seed=3"]
    assert not (sbatch / "asked").exists()
    assert {path.name for path in (tmp_path / "runs/tiny").iterdir()} == {"train.sbatch"}


def test_the_jobs_command_line_composes_to_the_configuration_that_was_checked(run: Run, tmp_path: Path) -> None:
    settings = ["run_name=big/a=b", 'samples.prompts=["it\'s $HOME", "a b"]', "data.corpus.validation_every=9",
                "paths.runs=my runs"]  # fmt: skip
    assert run("+recipe=tiny", *settings, "command=submit")[0] == 0
    words = command_of(tmp_path / "my runs/big/a=b/train.sbatch")
    code, out, err = run(*words, "--cfg", "job")
    assert (code, err) == (0, "")
    plain = yaml.safe_load(out)
    assert plain["samples"]["prompts"] == ["it's $HOME", "a b"]
    assert (plain["run_name"], plain["command"], plain["submit"]) == ("big/a=b", "train", False)
    assert plain["data"]["corpus"]["validation_every"] == 9


def test_submit_true_hands_it_to_sbatch(
    run: Run, tmp_path: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SBATCH_RESERVATION", "mine")
    code, out, err = run("+recipe=tiny", "command=submit", "submit=true")
    assert (code, err) == (0, "")
    assert "submitted: job 41; it prints to runs/tiny/slurm-41.out" in out
    assert (sbatch / "asked").read_text() == "--parsable runs/tiny/train.sbatch\n"
    environment = (sbatch / "env").read_text()
    assert "SLURM_JOB_ID" not in environment, "a job is not part of the one that it was submitted from"
    assert "SBATCH_RESERVATION=mine" in environment
    assert "submit" not in " ".join(command_of(tmp_path / "runs/tiny/train.sbatch"))


def test_what_slurm_says_is_said(run: Run, sbatch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sbatch / "sbatch").write_text('#!/bin/bash\necho "sbatch: error: invalid partition specified: x" >&2\nexit 1\n')
    code, _, err = run("+recipe=tiny", "command=submit", "submit=true")
    assert (code, err.count("\n")) == (2, 1)
    assert "SLURM refuses runs/tiny/train.sbatch: invalid partition specified: x" in err
    monkeypatch.setenv("PATH", str(sbatch / "none"))
    code, _, err = run("+recipe=tiny", "command=submit", "submit=true")
    assert (code, err.count("\n")) == (2, 1)
    assert "needs SLURM's sbatch, which is not on this machine" in err


def test_other_commands_become_jobs(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("+recipe=tiny", "command=submit", "cluster.command=prepare", "cluster.array=4")
    assert code == 0
    script = tmp_path / "runs/tiny/prepare.sbatch"
    assert command_of(script)[0] == "+recipe=tiny"
    assert command_of(script)[-1] == "command=prepare"
    text = script.read_text()
    assert "#SBATCH --array=0-3\n" in text
    assert "#SBATCH --job-name=prepare-tiny\n" in text
    assert "/slurm-prepare-%A_%a.out\n" in text
    assert "gpus" not in text
    folder = tmp_path / "runs" / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(compose_config("+recipe=tiny", "run_name=mine")))
    code, out, err = run("command=submit", "cluster.command=evaluate", "run=runs/mine", "evaluate.window=64")
    assert (code, err) == (0, "")
    assert command_of(folder / "evaluate.sbatch") == [
        "cluster.command=evaluate", "evaluate.window=64", "command=evaluate", "run=runs/mine"
    ]  # fmt: skip
    code, _, err = run("+recipe=tiny", "run_name=mine", "command=submit", "cluster.command=evaluate")
    assert (code, err) == (0, "")
    assert command_of(folder / "evaluate.sbatch") == [
        "+recipe=tiny", "cluster.command=evaluate", "command=evaluate", "run=runs/mine"
    ]  # fmt: skip
    assert "#SBATCH --job-name=evaluate-mine" in out


def test_a_job_never_submits_itself(run: Run, tmp_path: Path, sbatch: Path) -> None:
    code, _, err = run("+recipe=tiny", "command=submit", "++command=submit", "++submit=true")
    assert code == 0, err
    words = command_of(tmp_path / "runs/tiny/train.sbatch")
    assert not [word for word in words if "submit" in word]


def test_a_run_at_a_url_stays_one_in_the_job(
    run: Run, tmp_path: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITNET_TRAIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "far" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(compose_config("+recipe=tiny", "run_name=mine")))
    code, _, err = run("command=submit", "cluster.command=report", f"run=file://{folder}")
    assert (code, err) == (0, "")
    assert f"run=file://{folder}" in command_of(tmp_path / "runs/mine/report.sbatch")


def test_a_sweep_submits_a_job_for_each(run: Run, tmp_path: Path, sbatch: Path) -> None:
    code, _, err = run("-m", "+recipe=tiny", "seed=1,2", "quant=none", "command=submit", "submit=true")
    assert (code, err) == (0, "")
    asked = (sbatch / "asked").read_text().splitlines()
    assert asked == [f"--parsable runs/tiny/seed={seed}+quant=none/train.sbatch" for seed in (1, 2)]
    words = command_of(tmp_path / "runs/tiny/seed=2+quant=none/train.sbatch")
    assert words == ["+recipe=tiny", "seed=2", "quant=none", "run_name='tiny/seed=2+quant=none'"]
    assert run(*words, "command=estimate")[0] == 0
    assert (tmp_path / "runs/tiny/seed=2+quant=none/estimate").is_dir(), "the job finds its folder again"


def test_the_users_own_recipes_go_along(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/custom.yaml").write_text(
        'defaults: [tiny, _self_]\ncluster: {time: "02:00:00", partition: cpu}\n'
    )
    assert run("--config-dir", "mine", "+recipe=custom", "command=submit")[0] == 0
    script = tmp_path / "runs/custom/train.sbatch"
    assert command_of(script) == ["--config-dir", "mine", "+recipe=custom"]
    assert "#SBATCH --time=02:00:00\n#SBATCH --partition=cpu\n" in script.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["+recipe=tiny", "command=submit", "model.heads=7"], "model.heads=7 does not divide"),
        (["+recipe=tiny", "command=submit", "cluster.command=sumbit"], "cluster.command=sumbit is nothing that a job"),
        (["+recipe=tiny", "command=submit", "cluster.command=evaluate"], "run=runs/tiny does not exist"),
        (["command=submit"], "No recipe is chosen"),
        (["+recipe=tiny", "command=submit", "cluster.nodes=-2"], "cluster.nodes is -2"),
        (["+recipe=tiny", "submit=true"], "goes with command=submit"),
        (["-m", "+recipe=tiny", "seed=1,2", "command=submit", "hydra/launcher=slurm"], "both make jobs"),
    ],
)
def test_what_the_job_would_refuse_is_refused_before(
    run: Run, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert sentence in err
    assert not (tmp_path / "runs").exists()
