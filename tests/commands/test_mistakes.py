"""Every mistake on the command line is one sentence and exit code 2, and leaves nothing behind."""

from pathlib import Path

import pytest

from tests.commands.conftest import Run, files_in

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
