"""The command line: every mistake is one sentence and exit code 2, and what is right is composed as it was meant."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from bitnet_train.__main__ import answer
from bitnet_train.config import to_yaml
from bitnet_train.sweeps import expand, job_name
from tests.composing import compose_config, fresh_recipes, write

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command line in an empty folder; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def execute(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = answer(list(arguments))
        out = capsys.readouterr()
        return code, out.out, out.err

    with fresh_recipes():
        yield execute


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


MISTAKES = [
    # arguments, and what the sentence must say
    (["+recipe=tinny"], ["+recipe=tinny does not exist", "small, tiny", "mean 'tiny'"]),
    (["recipe=tiny"], ["with a plus: +recipe=tiny"]),
    (["recipe=tinny"], ["mean 'tiny'"]),
    (["+recipe="], ["choose one of"]),
    (["+recipe=[tiny,small]"], ["does not exist"]),
    (["+recipe=tiny", "+recipe=small"], ["Two recipes"]),
    (["command=estimate"], ["No recipe is chosen"]),
    (["optimizer.lrr=1"], ["optimizer.lrr is not a configuration key", "mean 'lr'"]),
    (["+recipe=tiny", "+optimizer.lrr=1"], ["optimizer.lrr is not a configuration key", "mean 'lr'"]),
    (["+recipe=tiny", "++optimizer.lrr=1"], ["optimizer.lrr is not a configuration key"]),
    (["+recipe=tiny", "optimiser.lr=1"], ["optimiser.lr", "mean 'optimizer.lr'"]),
    (["+recipe=tiny", "+foo=1"], ["foo is not a configuration key"]),
    (["+recipe=tiny", "model.hiden=8"], ["mean 'model.hidden'"]),
    (["+recipe=tiny", "model.heads=7"], ["model.heads=7 does not divide model.hidden=256"]),
    (["+recipe=tiny", "model.kv_heads=3"], ["model.kv_heads=3"]),
    (["+recipe=tiny", "model.residual_dtype=float16"], ["model.residual_dtype=float16", "relu2"]),
    (["+recipe=tiny", "model.norms=PRE"], ["model.norms=PRE", "pre_sub, pre"]),
    (["+recipe=tiny", "trainer.max_steps=abc"], ["trainer.max_steps must be a whole number, not 'abc'"]),
    (["+recipe=tiny", "trainer.max_steps=0"], ["trainer.max_steps is 0"]),
    (["+recipe=tiny", "trainer.max_steps=1.5"], ["must be a whole number"]),
    (["+recipe=tiny", "trainer.batch_tokens=1000"], ["trainer.batch_tokens=1000", "use 1024"]),
    (["+recipe=tiny", "trainer.micro_batch=3"], ["trainer.micro_batch=3"]),
    (["+recipe=tiny", "trainer.precision=fp8"], ["trainer.precision=fp8", "bf16-mixed"]),
    (["+recipe=tiny", "trainer.compile=maybe"], ["trainer.compile=maybe"]),
    (["+recipe=tiny", "quant=terary"], ["choose one of binary, bitnet_a4_8", "mean 'ternary'"]),
    (["+recipe=tiny", "quant.weight.scheme=trinary"], ["quant.weight.scheme=trinary", "mean 'ternary'"]),
    (["+recipe=tiny", "quant.weight.groups=7"], ["quant.weight.groups=7 does not divide"]),
    (["+recipe=tiny", "quant.activation.bits=9"], ["quant.activation.bits is 9"]),
    (["+recipe=tiny", 'quant.overrides=[{pattern:"nothing*",scheme:float}]'], ["'nothing*' matches no linear layer"]),
    (["+recipe=tiny", 'quant.overrides=[{patern:"*",scheme:float}]'], ["quant.overrides", "mean 'pattern'"]),
    (["+recipe=tiny", 'quant.overrides=[{pattern:"*.o_proj",bits:4}]'],
     ["quant.overrides, '*.o_proj'", "bits=4 belongs to quant.weight.scheme=symmetric, not to ternary"]),
    (["+recipe=tiny", 'quant.overrides=[{pattern:"*.o_proj",scheme:symmetric}]'],
     ["quant.overrides, '*.o_proj'", "needs quant.weight.bits=2, 3, 4 or 8"]),
    (["+recipe=tiny", "quant.overrides=[{pattern:null,bits:4}]"], ["quant.overrides: pattern cannot be null"]),
    (["+recipe=tiny", 'quant.overrides=[{pattern:"*",bits:x}]'], ["quant.overrides: bits must be a whole number"]),
    (["+recipe=tiny", "clip=by_pattern", 'clip.rules=[{pattern:"*",clip:norm}]'],
     ["clip.rules: clip must be settings in braces", "not 'norm'"]),
    (["+recipe=tiny", "schedule.warmup=1.5"], ["schedule.warmup is 1.5, which is no number of steps"]),
    (["+recipe=tiny", "schedule=wsd", "schedule.decay=1.5"], ["schedule.decay is 1.5, which is no number of steps"]),
    (["+recipe=tiny", "weight_decay_schedule.warmup=1.5"], ["weight_decay_schedule.warmup is 1.5"]),
    (["+recipe=tiny", "clip=scheduled", "clip.steps=1.5"], ["clip.steps is 1.5, which is no number of steps"]),
    (["+recipe=tiny", "regulariser=codes", "regulariser.start=2.5"], ["regulariser.start is 2.5"]),
    (["+recipe=tiny", "trainer.batch_warmup=[{until:2.5,tokens:1024}]"], ["trainer.batch_warmup[0].until is 2.5"]),
    (["+recipe=tiny", "quant/progressive=lambda", "quant.progressive.until=2.5"], ["quant.progressive.until is 2.5"]),
    (["+recipe=tiny", 'quant.overrides=[{pattern:"*",activation_bits:4,since:1.5}]'], ["since of '*' is 1.5"]),
    (["+recipe=tiny", "quant/progressive=bits", "quant.progressive.stages=[{bits:4,until:0.2},{bits:8,until:0.4}]"],
     ["quant.progressive.stages have 4, 8 bits, which must fall"]),
    (["+recipe=tiny", "guard.skip_non_finite=true", "guard.window=64", "guard.rollback_after=3"],
     ["guard.window has no effect with guard.rollback_after"]),
    (["+recipe=micro", "telemetry.most_zeros=0.5"], ["no effect with telemetry.every_steps=null"]),
    (["+recipe=tiny", "data.shuffle_window=64"], ["data.shuffle_window has no effect with data.shuffle=full"]),
    (["+recipe=tiny", "init.from=runs/x", "init=mitchell"], ["init has no effect with init.from"]),
    (["+recipe=tiny", "init.std=0.1", "resume.from=runs/x"], ["init.std has no effect with resume.from"]),
    (["+recipe=tiny", "init.from=x", "init.sub_norm_gain=0.5"], ["init.sub_norm_gain has no effect with init.from"]),
    (["+recipe=digits_vit", "generate.top_k=3"], ["generate.* is for language models"]),
    (["+recipe=digits_vit", "export.formats=[gguf-i2_s]"], ["export.formats are of language models"]),
    (["+recipe=tiny", "schedule=cosin"], ["schedule=cosin does not exist", "mean 'cosine'"]),
    (["+recipe=tiny", "schedule=cosine", "schedule.decay=0.1"],
     ["schedule=cosine has warmup, warmup_start, warmup_shape, final", "schedule=inverse_sqrt and wsd"]),
    (["+recipe=tiny", "schedule.name=cosine"], ["write schedule=cosine"]),
    (["+recipe=tiny", "optimizer.name=sgd"], ["write optimizer=sgd"]),
    (["+recipe=tiny", "schedule.warmup=900"], ["schedule.warmup=900", "trainer.max_steps=600"]),
    (["+recipe=2b4t", "schedule.stages=[{share:0.5},{share:0.4}]"], ["add up to 0.9"]),
    (["+recipe=2b4t", "schedule.stages=[{lr:1.0}]"], ["schedule.stages[0].share has no value"]),
    (["+recipe=tiny", "+schedule=cosine"], ["without '+'"]),
    (["+recipe=tiny", "+seed=3"], ["seed exists already"]),
    (["+recipe=tiny", "~seed"], ["cannot be removed"]),
    (["+recipe=tiny", "seed=null"], ["seed cannot be null"]),
    (["+recipe=tiny", "seed.x=1"], ["seed is a single value"]),
    (["+recipe=tiny", "optimizer.lr="], ["optimizer.lr must be a number"]),
    (["+recipe=tiny", "optimizer.lr=1,2"], ["add -m"]),
    (["+recipe=tiny", "optimizer.betas=[0.9]"], ["optimizer.betas"]),
    (["+recipe=tiny", "samples.prompts=abc"], ["samples.prompts must be a list"]),
    (["+recipe=tiny", "optimizer.lr=${nothing.here}"], ["nothing.here"]),
    (["+recipe=tiny", "foo"], ["'foo' is not a setting"]),
    (["+recipe=tiny", "=3"], ["'=3' is not a setting"]),
    (["+recipe=tiny", "a=[1,"], ["'a=[1,' cannot be read"]),
    (["+recipe=tiny", "data=files"], ["data.corpus.path is not set"]),
    (["+recipe=tiny", "data=files", "data.corpus.path=/does/not/exist"], ["/does/not/exist does not exist"]),
    (["+recipe=tiny", "data/corpus=file"], ["data/corpus=file does not exist", "mean 'files'"]),
    (["+recipe=tiny", "resume.form=x"], ["mean 'resume.from'"]),
    (["+recipe=tiny", "export.formats=[foo]"], ["'foo' does not exist"]),
    (["+recipe=tiny", "export.formats=[gguf-tq2_0]"], ["gguf-tq2_0 cannot hold this model", "model.activation=relu2"]),
    (["+recipe=tiny", "evaluate.shots=1"], ["evaluate.shots does nothing without evaluate.tasks"]),
    (["+recipe=tiny", "evaluate.tasks=[x]", "evaluate.task_folder=none", "evaluate.every_steps=1"], ["is no folder"]),
    (["+recipe=tiny", "generate.top_p=0"], ["generate.top_p=0 must be above 0"]),
    (["+recipe=tiny", "generate.stop=['']"], ["generate.stop holds an empty string"]),
    (["+recipe=tiny", "trainer.max_steps=0"], ["at least 1", "init.from="]),
    (["+recipe=tiny", "paths.runs="], ["paths.runs is empty"]),
    (["+recipe=tiny", "run=runs/tiny"], ["run= is for export"]),
    (["+recipe=tiny", "command=exprot"], ["command=exprot does not exist", "mean 'export'"]),
    (["command=export"], ["needs run=FOLDER"]),
    (["command=export", "run=runs/none"], ["run=runs/none does not exist"]),
    (["command=export", "run=."], ["neither a run"]),
    (["-m", "+recipe=tiny", "optimizer.lr=1e-3,xyz"], ["optimizer.lr must be a number, not 'xyz'"]),
    (["-m", "+recipe=tiny,tinny"], ["+recipe=tinny does not exist"]),
    (["--foo"], ["--foo"]),
    (["+recipe=tiny", "--cfg", "job", "--foo", "seed=1"], ["--foo"]),
    (["+recipe=tiny", "--cfg", "bar"], ["invalid choice: 'bar'"]),
    (["-m", "--cfg", "job"], ["cannot be combined"]),
    (["-m", "+recipe=tiny", "hydra/launcher=joblib"], ["hydra/launcher"]),
    (["-m", "+recipe=tiny", "optimizer.lr=interval(0,1)"], ["optimizer.lr"]),
    (["+recipe=tiny", "--resolve"], ["--cfg"]),
    (["--config-dir", "nowhere", "+recipe=tiny"], ["nowhere is not a folder"]),
    (["--config-dir"], ["--config-dir"]),
    *(
        (["+recipe=tiny", f"run_name='{name}'"], ["run_name="])
        for name in ("../x", "", "a b", "/abs", ".x", "a/../b", "a@3")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "wanted"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_one_sentence(run: Run, tmp_path: Path, arguments: list[str], wanted: list[str]) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("bitnet_train: ")
    assert err.count("\n") == 1, err
    for part in wanted:
        assert part in err
    assert files_in(tmp_path) == set(), "a refused command leaves nothing behind"


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
