"""The command line: every mistake is one sentence and exit code 2, and what is right is composed as it was meant."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bitnet_train.__main__ import answer
from bitnet_train.config import to_yaml
from bitnet_train.sweeps import expand, job_name
from tests.commands.conftest import Run, files_in
from tests.composing import compose_config, write

BAD_RECIPES = {
    "badtop": ("defaults: [tiny, _self_]\noptimiser: {lr: 1}\n", "mean 'optimizer'"),
    "badnested": ("defaults: [tiny, _self_]\noptimizer: {lrr: 1}\n", "mean 'lr'"),
    "badtype": ("defaults: [tiny, _self_]\nseed: abc\n", "seed must be a whole number"),
    "badgroup": ("defaults:\n  - override /schedulee: cosine\n  - _self_\nseed: 2\n", "mean 'schedule'"),
    "badoption": ("defaults:\n  - override /schedule: cosin\n  - _self_\nseed: 2\n", "mean 'cosine'"),
    "badparent": ("defaults: [tinny, _self_]\nseed: 2\n", "mean 'tiny'"),
    "badchoice": ("defaults: [tiny, _self_]\nschedule: cosine\n", "'- override /schedule: cosine'"),
    "badmodel": ("defaults: [tiny, _self_]\nmodel: small\n", "'- override /model: small'"),
    "badyaml": ("seed: [1\noptimizer:\n", "not readable YAML"),
    "empty": ("", "holds no settings"),
    "alist": ("- seed\n", "holds no settings"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
@pytest.mark.parametrize("style", ["", "recipes__", "recipe__"], ids=["flat", "recipes", "hydra"])
def test_a_mistake_in_a_recipe_names_the_file(run: Run, tmp_path: Path, name: str, style: str) -> None:
    text, wanted = BAD_RECIPES[name]
    header = "# @package _global_\n" if style == "recipe__" else ""
    write(tmp_path / "mine", **{f"{style}{name}": header + text})
    code, out, err = run("--config-dir", "mine", f"+recipe={name}")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert f"mine/{style.replace('__', '/')}{name}.yaml" in err
    assert wanted in err


def test_a_mistake_in_a_parent_recipe_names_the_parent(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "mine", parent=BAD_RECIPES["badoption"][0], child="defaults: [parent, _self_]\nseed: 2\n")
    code, _, err = run("--config-dir", "mine", "+recipe=child")
    assert code == 2
    assert "mine/parent.yaml: schedule=cosin" in err


def test_a_broken_file_beside_the_recipe_does_no_harm(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "mine", badyaml="a: [1", custom="defaults: [tiny, _self_]\nseed: 9\n")
    code, out, _ = run("--config-dir", "mine", "+recipe=custom", "--cfg", "job", "--package", "seed")
    assert code == 0
    assert out.strip().endswith("9")


def test_a_recipe_that_names_itself_is_refused(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "mine", loop="defaults: [loop, _self_]\nseed: 2\n")
    code, _, err = run("--config-dir", "mine", "+recipe=loop")
    assert (code, err.count("\n")) == (2, 1)
    assert "names itself" in err


def test_a_config_yaml_in_the_users_folder_is_refused(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "mine", config="seed: 1\n")
    assert run("--config-dir", "mine", "+recipe=tiny")[0] == 2


def test_hydras_style_without_its_header_says_what_is_missing(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "mine", recipe__custom="defaults: [tiny, _self_]\nseed: 4\n")
    code, _, err = run("--config-dir", "mine", "+recipe=custom")
    assert code == 2
    assert "# @package _global_" in err


def test_a_users_recipe_inherits_chooses_and_yields_to_the_command_line(run: Run, tmp_path: Path) -> None:
    write(
        tmp_path / "mine",
        custom="defaults:\n  - base\n  - override /schedule: cosine\n  - override /model: narrow\n  - _self_\n"
        "schedule: {final: 0.3}\noptimizer: {lr: 0.007}\n",
        base="defaults: [tiny, _self_]\nseed: 5\noptimizer: {weight_decay: 0.03}\n",
        model__narrow="hidden: 128\nlayers: 2\nheads: 2\nkv_heads: 2\nffn: 256\ncontext: 512\n",
    )

    def composed(*more: str) -> dict[str, object]:
        code, out, _ = run("+recipe=custom", "--config-dir", "mine", *more[:1], "--cfg", "job", *more[1:])
        assert code == 0
        plain = yaml.safe_load(out)
        return {
            "lr": plain["optimizer"]["lr"], "decay": plain["optimizer"]["weight_decay"], "seed": plain["seed"],
            "schedule": plain["schedule"]["name"], "final": plain["schedule"].get("final"),
            "hidden": plain["model"]["hidden"],
        }  # fmt: skip

    recipe = {"lr": 0.007, "decay": 0.03, "seed": 5, "schedule": "cosine", "hidden": 128, "final": 0.3}
    assert composed() == recipe
    assert composed("optimizer.lr=0.5", "schedule.final=0.2") == recipe | {"lr": 0.5, "final": 0.2}
    assert composed("model=tiny", "seed=6") == recipe | {"hidden": 256, "seed": 6}


def test_a_choice_on_the_command_line_beats_the_recipes(run: Run) -> None:
    code, out, _ = run("+recipe=2b4t", "schedule=wsd", "data/tokenizer=bpe", "--cfg", "job")
    plain = yaml.safe_load(out)
    assert code == 0
    assert plain["schedule"]["name"] == "wsd"
    assert plain["data"]["tokenizer"]["name"] == "bpe"


def test_another_choice_leaves_out_only_what_it_cannot_hold(run: Run, tmp_path: Path) -> None:
    def composed(*arguments: str) -> dict[str, dict[str, object]]:
        code, out, err = run(*arguments, "--cfg", "job")
        assert code == 0, err
        plain: dict[str, dict[str, object]] = yaml.safe_load(out)
        return plain

    assert composed("+recipe=2b4t", "schedule=wsd")["schedule"] == {
        "name": "wsd", "warmup": 2000.0, "warmup_start": 0.0, "warmup_shape": "linear",
        "decay": 0.2, "shape": "linear", "final": 0.0,
    }  # fmt: skip
    assert composed("+recipe=2b4t", "clip=percentile")["clip"]["name"] == "percentile"
    # The same between recipes: a child that chooses another schedule than its parents.
    write(
        tmp_path / "mine",
        child="defaults: [1_3b, override /schedule: wsd, override /clip: none, _self_]\nschedule: {decay: 0.3}\n",
        texts="defaults: [tiny, override /data: files, _self_]\ndata: {corpus: {path: here}}\n",
        typo="defaults: [tiny, override /schedule: wsd, _self_]\nschedule: {dekay: 0.3}\n",
    )
    mine = ("--config-dir", "mine")
    assert composed(*mine, "+recipe=child")["schedule"]["decay"] == 0.3
    assert composed(*mine, "+recipe=child")["schedule"]["warmup"] == 375
    assert len(composed(*mine, "+recipe=child", "schedule=two_stage")["schedule"]["stages"]) == 2  # type: ignore[arg-type]
    assert composed(*mine, "+recipe=texts")["data"]["corpus"]["path"] == "here"  # type: ignore[index]
    assert composed(*mine, "+recipe=texts", "data=stdlib")["data"]["corpus"]["name"] == "stdlib"  # type: ignore[index]
    for more in ([], ["schedule=linear"]):
        code, _, err = run(*mine, "+recipe=typo", *more)
        assert code == 2
        assert "dekay" in err


def test_a_sweep_over_variants(run: Run, tmp_path: Path) -> None:
    assert run("-m", "+recipe=700m", "schedule=two_stage,wsd", "command=estimate")[0] == 0
    assert {path.name for path in (tmp_path / "runs" / "700m").iterdir()} == {"schedule=two_stage", "schedule=wsd"}


@pytest.mark.parametrize(
    ("arguments", "steps"), [(["--cfg", "job"], 500), (["+recipe=tiny", "--cfg", "job", "--resolve"], 600)]
)
def test_cfg_prints_the_configuration(run: Run, tmp_path: Path, arguments: list[str], steps: int) -> None:
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["trainer"]["max_steps"] == steps
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["+recipe=tiny", "--help"]])
def test_help_is_short_and_lists_the_choices(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) <= 70
    assert max(map(len, lines)) <= 110
    schedules = "constant, cosine, exponential, inverse_sqrt, linear, polynomial, two_stage, wsd"
    assert f" schedule {schedules} " in " ".join(out.split())
    assert "hydra/" not in out
    for command in ("train", "prepare", "estimate", "export", "verify", "evaluate", "generate"):
        assert f"  {command} " in out


def test_help_lists_the_users_recipes(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "mine", custom="seed: 2\n")
    assert "continue_16_to_1_58, custom, digits_mlp," in " ".join(run("--config-dir", "mine", "--help")[1].split())


def test_commands_on_a_broken_run_name_its_file(run: Run, tmp_path: Path) -> None:
    for name, text in {"torn": "a: [1", "foreign": "seed: 1\n", "list": "- 1\n"}.items():
        write(tmp_path / "runs" / name, config=text)
        code, _, err = run("command=export", f"run=runs/{name}")
        assert (code, err.count("\n")) == (2, 1), err
        assert f"runs/{name}/config.yaml" in err
    good = yaml.safe_load(to_yaml(compose_config("+recipe=tiny")))
    good["optimizer"]["lrr"] = 1
    write(tmp_path / "runs" / "newer", config=yaml.safe_dump(good))
    code, _, err = run("command=export", "run=runs/newer")
    assert code == 2
    assert "lrr" in err


def test_the_recipe_and_the_job_name_the_run(run: Run) -> None:
    assert "run=runs/tiny does not exist" in run("+recipe=tiny", "command=export")[2]
    assert "run=runs/mine does not exist" in run("+recipe=tiny", "command=export", "run_name=mine")[2]
    err = run("-m", "+recipe=tiny", "seed=1,2", "quant=none", "command=export")[2]
    for seed in (1, 2):
        assert f"run=runs/tiny/seed={seed}+quant=none does not exist" in err
    # And the name of a job can be typed as it is.
    assert "run=runs/tiny/seed=1+quant=none does not" in run("command=export", "run=runs/tiny/seed=1+quant=none")[2]


def test_a_run_keeps_its_own_model(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "runs" / "tiny", config=to_yaml(compose_config("+recipe=tiny")))
    for override in ("quant=none", "model=small", "schedule=cosine"):
        code, _, err = run("command=export", "run=runs/tiny", override)
        assert code == 2
        assert "cannot be changed" in err


def test_an_estimate_says_what_cannot_be_exported(run: Run) -> None:
    for recipe, said in (("bitnet_v2_400m", True), ("trilm_99m", False), ("digits_mlp", False)):
        code, out, _ = run(f"+recipe={recipe}", "command=estimate")
        assert code == 0
        assert ("warning: no export format can hold this model" in out) is said


def test_estimate_writes_its_folder_and_nothing_else(run: Run, tmp_path: Path) -> None:
    code, out, err = run("+recipe=2b4t", "command=estimate", "run_name=big/one")
    assert (code, err) == (0, "")
    assert "2,412,820,480" in out
    assert "2,084,044,800" in out
    assert "0.52 GB" in out
    assert "0.42 GB" in out
    assert max(map(len, out.splitlines())) <= 80
    assert files_in(tmp_path) == {"runs/big/one/estimate/estimate.json", "runs/big/one/estimate/schedule.png"}


def test_a_sweep_gives_every_job_its_own_folder(run: Run, tmp_path: Path) -> None:
    code, _, err = run("-m", "+recipe=tiny", "optimizer.lr=1e-3,2e-3", "trainer.max_steps=50", "command=estimate")
    assert (code, err) == (0, "")
    for value in ("1e-3", "2e-3"):
        folder = tmp_path / "runs" / "tiny" / f"optimizer.lr={value}" / "estimate"
        figures = json.loads((folder / "estimate.json").read_text())
        assert max(point["lr"] for point in figures["curve"]) == pytest.approx(float(value), rel=0.1)
    assert {path.split("/")[0] for path in files_in(tmp_path)} == {"runs"}
    assert len(files_in(tmp_path)) == 4, "no multirun.yaml, no .hydra, no outputs/"


def test_a_sweep_goes_on_after_a_failed_job(run: Run, tmp_path: Path) -> None:
    code, out, err = run("-m", "+recipe=tiny", "model.heads=7,8", "model.kv_heads=4", "command=estimate")
    assert code == 2
    assert "model.heads=7" in err
    assert err.count("\n") == 1
    assert "runs/tiny/model.heads=8+model.kv_heads=4" in out


def test_a_sweep_over_recipes_uses_their_names(run: Run, tmp_path: Path) -> None:
    assert run("-m", "+recipe=tiny,small", "command=estimate")[0] == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"tiny", "small"}


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["+recipe=tiny", "optimizer.lr=1e-3,2e-3"], ["optimizer.lr=1e-3", "optimizer.lr=2e-3"]),
        # What may change in a continued run does not name a job, unless the sweep is over it.
        (["seed=1,2", "trainer.max_steps=9"], ["seed=1", "seed=2"]),
        (["trainer.max_steps=8,9"], ["trainer.max_steps=8", "trainer.max_steps=9"]),
        (["seed=1,2", "quant=none"], ["seed=1+quant=none", "seed=2+quant=none"]),
        (["seed=range(1,3)"], ["seed=1", "seed=2"]),
        (["schedule=choice(wsd,cosine)"], ["schedule=wsd", "schedule=cosine"]),
        (["data.corpus.path=a/b,c"], ["data.corpus.path=a_b", "data.corpus.path=c"]),
        (["optimizer.betas=[0.9,0.98],[0.9,0.9]"], ["optimizer.betas=_0.9_0.98", "optimizer.betas=_0.9_0.9"]),
        (["+recipe=tiny,small"], ["", ""]),
    ],
)
def test_jobs_and_their_names(overrides: list[str], names: list[str]) -> None:
    swept, combinations = expand(overrides)
    assert [job_name(line, swept) for line in combinations] == names


def test_long_names_keep_what_the_jobs_differ_in() -> None:
    swept, combinations = expand([f"data.corpus.path={'x' * 300}", "clip=norm,zscore"])
    names = [job_name(line, swept) for line in combinations]
    assert [name.partition("+")[0] for name in names] == ["clip=norm", "clip=zscore"]


def test_long_names_of_jobs_stay_distinct_and_short() -> None:
    one, two = (job_name([f"data.corpus.path={'x' * 300}{end}"], set()) for end in "ab")
    assert one != two
    assert len(one) == len(two) == 120


def test_the_program_exits_with_the_code_and_loads_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys; from bitnet_train.__main__ import answer; code = answer(sys.argv[1:]); "
        "print(code, [m for m in ('torch', 'lightning', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    for arguments in (["+recipe=tinny"], ["+recipe=tiny", "model.heads=7"], ["--help"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] in ("2 []", "0 []"), done.stderr
    start = time.monotonic()
    command = [sys.executable, "-m", "bitnet_train", "+recipe=tinny"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert time.monotonic() - start < 10, "0.6 s on an idle machine"


def test_a_named_launcher_runs_the_sweep_through_hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["-m", "hydra/launcher=basic", "+recipe=tiny", "command=estimate", "model.heads=4,7,8"]
    assert answer(line) == 2  # 7 heads do not divide the width; the others ran
    runs = tmp_path / "runs" / "tiny"
    assert {path.name for path in runs.iterdir()} == {"model.heads=4", "model.heads=8", "multirun.yaml"}
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
