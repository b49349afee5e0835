"""``+sweep=NAME`` stands for the lines of conf/sweep/NAME.yaml."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitnet_train.__main__ import answer, put_sweeps_in
from bitnet_train.errors import ConfigError
from bitnet_train.recipes import config_folder, read_sweep
from tests.composing import CATALOGUE, fresh_recipes, write

Run = Callable[..., tuple[int, str, str]]
SWEEPS = sorted(path.stem for path in (config_folder("conf") / "sweep").glob("*.yaml"))


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


def jobs(folder: Path) -> set[str]:
    return {path.name for path in (folder / "runs" / "tiny").iterdir()}


def test_a_sweep_expands_to_its_lines_where_it_stands() -> None:
    lines = put_sweeps_in(["+recipe=tiny", "+sweep=lr", "seed=2"], CATALOGUE, True)
    assert lines == ["+recipe=tiny", "optimizer.lr=2e-3,4e-3,8e-3,16e-3,32e-3", "seed=2"]
    both = put_sweeps_in(["+sweep=clip", "+sweep=init"], CATALOGUE, True)
    assert [line.partition("=")[0] for line in both] == ["clip", "init", "init.sub_norm_gain"]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_shipped_sweep_composes(run: Run, tmp_path: Path, name: str) -> None:
    code, _, err = run("-m", "+recipe=tiny", f"+sweep={name}", "command=estimate")
    assert (code, err) == (0, "")
    expected = 1
    for line in read_sweep(config_folder("conf") / "sweep" / f"{name}.yaml"):
        expected *= len(line.partition("=")[2].split(","))
    assert len(jobs(tmp_path)) == expected > 1


@pytest.mark.parametrize(
    "settings",
    [
        ("+sweep=lr", "optimizer.lr=1e-3"),
        ("optimizer.lr=1e-3", "+sweep=lr"),
        ("+sweep=lr", "++optimizer.lr=1e-3"),
        ("optimizer.lr=1e-3,2e-3", "optimizer.lr=5e-3"),
        ("optimizer.lr=1e-3,2e-3", "optimizer.lr=5e-3", "hydra/launcher=basic"),
    ],
)
def test_a_swept_key_that_is_set_again_is_refused(run: Run, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """The last one would count in every run: several names for the same run, ranked."""
    code, out, err = run("-m", "+recipe=tiny", *settings, "command=estimate")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "The sweep sets optimizer.lr 2 times" in err
    assert not (tmp_path / "runs").exists()


def test_a_sweep_is_refused_without_several_runs(run: Run, tmp_path: Path) -> None:
    code, out, err = run("+recipe=tiny", "+sweep=lr", "command=estimate")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "+sweep=lr makes many runs: put -m in front of the settings" in err
    assert not (tmp_path / "runs").exists()


def test_an_unknown_sweep_is_answered_by_those_there_are(run: Run) -> None:
    code, _, err = run("-m", "+recipe=tiny", "+sweep=clips")
    assert (code, err.count("\n")) == (2, 1)
    assert f"The sweep clips does not exist; choose one of {', '.join(SWEEPS)}." in err
    assert "Did you mean 'clip'?" in err


def test_a_users_own_sweep(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "mine", sweep__seeds="- seed=5,6\n- trainer.max_steps=20\n")
    code, _, err = run("-m", "--config-dir", "mine", "+recipe=tiny", "+sweep=seeds", "command=estimate")
    assert (code, err) == (0, "")
    assert jobs(tmp_path) == {"seed=5", "seed=6"}


@pytest.mark.parametrize("text", ["seed: 1,2\n", "- 3\n", "- seed\n", "- [\n"])
def test_a_file_that_is_no_sweep_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"The sweep .*odd\.yaml (must be a list|is not readable)"):
        read_sweep(path)
