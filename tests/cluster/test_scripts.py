"""The sbatch scripts: golden files, quoting, and the examples in slurm/."""

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bitnet_train.cluster.config import ClusterConfig, ContainerEngine
from bitnet_train.cluster.examples import EXAMPLES, texts
from bitnet_train.cluster.layout import Layout
from bitnet_train.cluster.render import Job, render
from bitnet_train.errors import ConfigError
from tests.composing import compose_config

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = Path(__file__).parent / "golden"
PLAIN = Job(
    name="tiny/seed=1", arguments=("+recipe=tiny", "seed=1", "run_name='tiny/seed=1'"), layout=Layout(1, 1, 1),
    log="/home/me/work/runs/tiny/seed=1/slurm-%j.out", folder="/home/me/work", python="/home/me/.venv/bin/python",
    remarks=("a remark",),
)  # fmt: skip
CASES = {
    "one_gpu": (ClusterConfig(), PLAIN),
    "everything": (
        ClusterConfig(
            memory="64G", time="1-12:00:00", partition="gpu,long", account="proj", qos="high", constraint="a100|h100",
            modules=["cuda/12.4", "gcc"], setup=["source ~/venv/bin/activate"], signal_lead=300, max_requeues=3,
            sbatch=["--exclusive", "--mail-type=END"], python="~/my env/bin/python", cpus_per_task=None,
        ),
        replace(PLAIN, layout=Layout(4, 8, 8, ("trainer.num_nodes=4",))),
    ),
    "apptainer": (
        ClusterConfig(container="/images/bt 1.sif", container_mounts=["/data:/data"]), replace(PLAIN, folder="/my work")
    ),
    "enroot": (
        ClusterConfig(
            container="docker://nvcr.io#nvidia/pytorch:25.01-py3", container_engine=ContainerEngine.enroot,
            container_mounts=["/data"], python="python", max_requeues=0,
        ),
        replace(PLAIN, layout=Layout(2, 4, 4)),
    ),
    "prepare_array": (
        ClusterConfig(command="prepare", array=16),
        replace(PLAIN, layout=Layout(1, 1, 0), arguments=("+recipe=tiny", "command=prepare")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_script_is_what_it_was(name: str) -> None:
    text = render(*CASES[name])
    assert text == (GOLDEN / f"{name}.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_the_examples_in_slurm_are_what_the_renderer_gives() -> None:
    if not (ROOT / "slurm").is_dir():
        pytest.skip("an installed wheel has no slurm/")
    written = {path.name: path.read_text() for path in (ROOT / "slurm").glob("*.sbatch")}
    assert written == texts(), "python -m bitnet_train.cluster.examples writes them anew"


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_command_line_of_an_example_composes(name: str) -> None:
    known = vars(compose_config("+recipe=tiny").trainer)
    lines = [line for line in EXAMPLES[name].arguments if not line.startswith("run=")]
    lines = [x for x in lines if not x.startswith("trainer.") or x.partition("=")[0].removeprefix("trainer.") in known]
    if name == "evaluate":
        pytest.importorskip("lm_eval")
        lines.append("+recipe=125m")
    compose_config(*lines)


def test_every_argument_reaches_the_program_as_it_is(tmp_path: Path) -> None:
    """The script is run, with an srun that shows what it was given."""
    arguments = ("+recipe=tiny", "samples.prompts=['a b', \"$(touch oops)\"]", "x=;touch oops", "y=`touch oops`", "z=*")
    job = replace(PLAIN, arguments=arguments, python="/with space/python")
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\necho "threads $OMP_NUM_THREADS"\nexit 7\n')
    (tmp_path / "srun").chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(render(ClusterConfig(setup=["true"]), job))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": "9",
                   "SLURM_CPUS_PER_TASK": "8"}  # fmt: skip
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 7, "the job ends as its program does"
    shown = ["--cpus-per-task=8", "/with space/python", "-m", "bitnet_train", *arguments, "threads 8"]
    assert done.stdout.splitlines() == shown
    assert not (tmp_path / "oops").exists()


@pytest.mark.parametrize("engine", ContainerEngine)
def test_an_image_under_home_is_found_there(engine: ContainerEngine, tmp_path: Path) -> None:
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    cluster = ClusterConfig(container="~/my images/bt.sqsh", container_engine=engine)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": "/users/me", "SLURM_JOB_ID": "1",
                   "SLURM_JOB_END_TIME": "9"}  # fmt: skip
    done = subprocess.run(["bash"], input=render(cluster, PLAIN), env=environment, text=True, capture_output=True)
    given = done.stdout.splitlines()
    assert any(word.removeprefix("--container-image=") == "/users/me/my images/bt.sqsh" for word in given), given


@pytest.mark.parametrize(
    ("code", "restarts", "container", "requeues"),
    [(0, 0, False, False), (1, 0, False, False), (143, 0, False, False), (138, 0, False, True), (140, 2, False, True),
     (138, 3, False, False), (143, 0, True, True), (143, 3, True, False), (2, 0, True, False)],
)  # fmt: skip
def test_the_script_requeues_what_python_cannot(
    tmp_path: Path, code: int, restarts: int, container: bool, requeues: bool
) -> None:
    for name, text in {"srun": f"exit {code}", "scontrol": f'echo "$@" >> {tmp_path}/asked'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    cluster = ClusterConfig(max_requeues=3, container="/x.sif" if container else None)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": "9",
                   "SLURM_RESTART_COUNT": str(restarts)}  # fmt: skip
    done = subprocess.run(["bash"], input=render(cluster, PLAIN), env=environment, text=True, cwd=tmp_path)
    assert done.returncode == code
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 17\n" if requeues else "")


@pytest.mark.parametrize("folder", ["/a\nb", "/a\"b'c", "/a\\b"])
def test_a_folder_that_sbatch_would_misread_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="sbatch cannot take --chdir="):
        render(ClusterConfig(), replace(PLAIN, folder=folder))


def test_words_of_options_are_quoted_for_sbatch() -> None:
    text = render(ClusterConfig(), replace(PLAIN, folder="/my work", log="/it's/slurm-%j.out"))
    lines = text.splitlines()
    assert "#SBATCH --chdir='/my work'" in lines
    assert '#SBATCH --output="/it\'s/slurm-%j.out"' in lines
    assert shlex.split(lines[lines.index("#SBATCH --chdir='/my work'")], comments=False)[1] == "--chdir=/my work"
