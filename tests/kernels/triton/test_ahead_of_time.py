"""The check without a GPU: that it sees what it is there to see, and that pruning agrees with it."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitnet_train.kernels.triton import ahead_of_time, tuning
from bitnet_train.kernels.triton.ahead_of_time import ARCHITECTURES, Row, all_specialisations, markdown, plan
from bitnet_train.kernels.triton.matmul import quantised_matmul_kernel
from bitnet_train.kernels.triton.tuning import Family, Tile, TiledSpecialisation

FAMILIES = {
    name: getattr(tuning, name) for name in ("INT8", "FP8", "PACKED", "FLOAT", "WEIGHT", "BLOCK_WEIGHT", "FLOAT32")
}

# Kernels with faults, and one without; a process of its own, since this one interprets kernels instead of compiling.
FAULTS = """
import dataclasses, json, sys
import triton
import triton.language as tl
from bitnet_train.kernels.triton import matmul
from bitnet_train.kernels.triton.ahead_of_time import check
from bitnet_train.kernels.triton.specialisation import Specialisation
from bitnet_train.kernels.triton.tuning import Tile, TiledSpecialisation

@triton.jit
def divide_kernel(x, y):
    i = tl.arange(0, 128)
    tl.store(y + i, tl.load(x + i) / tl.load(y + i))

@triton.jit
def exact_kernel(x, y):
    i = tl.arange(0, 128)
    tl.store(y + i, tl.div_rn(tl.load(x + i), tl.load(y + i)) * 3.0 + 1.0)

@triton.jit
def broken_kernel(x, y):
    tl.store(y, undefined)

types = {"x": "*fp32:16", "y": "*fp32:16"}
def form(kernel, **changes):
    return Specialisation(kernel, types, {}, 4, 1, **changes)

matmul_form = next(f for f in matmul.SPECIALISATIONS if f.constants["TMA"] and f.num_warps == 4)
pointers = next(f for f in matmul.SPECIALISATIONS if f.tile == matmul_form.tile)
huge = Tile(128, 128, 128, 8, 8)
forms = {
    "division": (form(divide_kernel, quantiser=True), 80),
    "division elsewhere": (form(divide_kernel), 80),
    "exact": (form(exact_kernel, quantiser=True), 80),
    "no tensor cores": (form(exact_kernel, instruction="int8"), 90),
    "wrong instruction": (dataclasses.replace(pointers, instruction="bf16"), 80),
    "broken": (form(broken_kernel), 80),
    "spilling": (dataclasses.replace(pointers, num_warps=1), 80),
    "ampere": (pointers, 80),
    "hopper": (matmul_form, 90),
    "too large": (dataclasses.replace(pointers, constants={**pointers.constants, **huge.constants()},
                                      num_warps=huge.warps, num_stages=huge.stages), 86),
}
rows = {name: dataclasses.asdict(check(*arguments)) for name, arguments in forms.items()}
rows["pruned"] = dataclasses.asdict(check(dataclasses.replace(pointers, tile=huge), 86))
print(json.dumps(rows))
"""


def compiling(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    script = tmp_path_factory.mktemp("faults") / "faults.py"
    script.write_text(FAULTS)
    done = compiling(str(script))
    assert done.returncode == 0, done.stderr
    rows: dict[str, dict[str, object]] = json.loads(done.stdout)
    return rows


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("division", "decides codes with div.full.f32"),
        ("no tensor cores", "has no int8 tensor-core instruction"),
        ("wrong instruction", "has no bf16 tensor-core instruction"),
        ("broken", "does not compile: "),
        ("spilling", "spills registers ("),
        ("too large", "bytes of shared memory of 101376"),
    ],
)
def test_faults_are_named(found: dict[str, dict[str, object]], name: str, problem: str) -> None:
    assert problem in str(found[name]["problem"])


def test_what_is_sound_passes_with_its_measures(found: dict[str, dict[str, object]]) -> None:
    for name in ("division elsewhere", "exact", "ampere", "hopper"):
        assert found[name]["problem"] is None
        assert int(str(found[name]["registers"])) > 8
        assert found[name]["spills"] == 0
    assert found["ampere"]["instruction"] == "mma.sync int8"
    assert found["hopper"]["instruction"] == "wgmma int8"
    assert int(str(found["hopper"]["shared"])) > 10_000
    assert found["pruned"]["pruned"] is True
    assert found["pruned"]["problem"] is None
    assert found["pruned"]["registers"] == 0


@pytest.mark.parametrize(
    ("capability", "ptx", "used", "problem"),
    [
        (90, "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8", "wgmma int8", None),
        (90, "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", "mma.sync int8", "instead of wgmma"),
        (100, "tcgen05.mma.cta_group::1.kind::i8 [%r1]", "tcgen05 int8", None),
        (100, "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", "mma.sync int8", None),
        (120, "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32", "mma.sync int8", None),
        (120, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "", "no int8"),
    ],
)
def test_the_instruction_is_the_generations_own(capability: int, ptx: str, used: str, problem: str | None) -> None:
    form = next(f for _, _, f in all_specialisations() if isinstance(f, TiledSpecialisation) and f.tile.rows == 128)
    found, wrong = ahead_of_time.instruction_used(form, capability, ptx)
    assert found == used
    assert (wrong is None) if problem is None else (problem in str(wrong))


def test_narrow_tiles_may_use_the_older_instruction() -> None:
    form = next(f for _, _, f in all_specialisations() if isinstance(f, TiledSpecialisation) and f.tile.rows == 16)
    ptx = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
    assert ahead_of_time.instruction_used(form, 90, ptx) == ("mma.sync int8", None)


def test_every_form_names_its_arguments_and_has_its_own_description() -> None:
    seen = set()
    for module, _, form in all_specialisations():
        names = set(form.kernel.arg_names)
        assert set(form.signature) | set(form.constants) == names, form.kernel.__name__
        assert not set(form.signature) & set(form.constants)
        seen.add(module)
    assert seen == set(ahead_of_time.MODULES)
    tiled = [form for _, _, form in all_specialisations() if isinstance(form, TiledSpecialisation)]
    assert len({(form.kernel.__name__, ahead_of_time.describe(form)) for form in tiled}) == len(tiled)


def test_the_plan_covers_every_form_where_it_can_run() -> None:
    forms = {(module, index): form for module, index, form in all_specialisations()}
    full = plan(quick=False)
    assert set(full) == {(*place, c) for place, form in forms.items() for c in ARCHITECTURES if c >= form.minimum}
    quick = plan(quick=True)
    assert set(quick) < set(full)
    assert {c for _, _, c in quick} == {80, 90}
    for capability in (80, 90):
        kernels = {forms[module, index].kernel.__name__ for module, index, c in quick if c == capability}
        assert kernels == {form.kernel.__name__ for form in forms.values()}
        assert not any(
            form.pruned(capability)
            for module, index, c in quick
            if c == capability and isinstance(form := forms[module, index], TiledSpecialisation)
        )


def test_every_gpu_has_tiles_for_every_number_of_tokens() -> None:
    for family in FAMILIES.values():
        for capability in (*ARCHITECTURES, 87, 103, 110, 121, 130):
            for tokens in (1, 16, 64, 100, 512, 4096, 1 << 20):
                for result_bytes in (2, 4):
                    tiles = family.candidates(capability, tuning.token_bucket(tokens), result_bytes)
                    assert tiles
                    assert all(family.fits(tile, capability, result_bytes) for tile in tiles)


def test_tiles_follow_the_number_of_tokens() -> None:
    few, many = (tuning.INT8.candidates(90, tokens, 2) for tokens in (16, 16_384))
    assert max(tile.rows for tile in few) <= 64
    assert min(tile.rows for tile in few) == 16
    assert min(tile.rows for tile in many) == 64
    assert Tile(64, 64, 64, 4, 4) in tuning.WEIGHT.candidates(90, 16_384, 4)  # whose rows are no tokens


def test_large_tiles_are_for_gpus_with_the_registers_and_the_memory() -> None:
    large = tuning.INT8.tiles[0]
    assert tuning.INT8.fits(large, 90, 2)
    assert not tuning.INT8.fits(large, 80, 2)
    assert not tuning.INT8.fits(large, 120, 2)
    assert not tuning.INT8.fits(Tile(128, 128, 128, 8, 4), 86, 2)
    assert tuning.shared_memory_limit(87) == 163 * 1024
    assert tuning.shared_memory_limit(88) == 99 * 1024  # unknown: the least of its generation
    assert tuning.shared_memory_limit(130) == 99 * 1024  # an unknown generation: the least of all


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, 16), (16, 16), (17, 32), (1000, 1024), (1024, 1024), (1025, 2048), (16_384, 16_384)]
)
def test_tokens_are_rounded_up_to_a_power_of_two(tokens: int, bucket: int) -> None:
    assert tuning.token_bucket(tokens) == bucket


def test_the_autotuner_gets_the_pruned_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "capability_of", lambda _: 86)
    family = Family((Tile(128, 128, 128, 8, 3), Tile(128, 128, 128, 8, 4), Tile(64, 64, 64, 4, 3)), step_bytes=(1, 1))
    tuner = tuning.autotuned(quantised_matmul_kernel, family)
    assert tuner is tuning.autotuned(quantised_matmul_kernel, family)
    arguments = {"out": torch.zeros(1, 1, dtype=torch.bfloat16), "tokens_bucket": 512}
    kept = tuner.early_config_prune(tuner.configs, {}, **arguments)
    assert [(c.kwargs["BLOCK_ROWS"], c.num_warps, c.num_stages) for c in kept] == [(128, 8, 3), (64, 4, 3)]
    assert set(tuner.keys) <= set(tuner.arg_names)


def test_a_launch_on_a_gpu_times_the_tiles_once_and_forbids_fused_multiply_adds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    family = Family((Tile(128, 128, 128, 8, 3), Tile(64, 64, 64, 4, 3), Tile(64, 64, 64, 2, 3)), step_bytes=(1, 1))
    tuner = tuning.autotuned(quantised_matmul_kernel, family)
    launched: list[dict[str, Any]] = []
    allocators: list[Any] = []

    def time_it(call: Any, quantiles: Any) -> list[float]:
        call()
        return [abs(launched[-1]["num_warps"] - 4.0)] * 3

    monkeypatch.setattr(tuner, "fn", SimpleNamespace(run=lambda **arguments: launched.append(arguments)))
    monkeypatch.setattr(tuner, "_do_bench", time_it)
    monkeypatch.setattr(tuner, "cache_results", False)
    monkeypatch.setattr(tuning, "capability_of", lambda _: 90)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    monkeypatch.setattr(tuning.triton, "set_allocator", allocators.append)
    out = SimpleNamespace(is_cuda=True, device="cpu", itemsize=2, dtype=torch.bfloat16)
    arguments = {"out": out, "M": 500, "tokens_bucket": 512, "N": 64, "K": 64, "TMA": True}
    tuning.launch(quantised_matmul_kernel, family, (7,), arguments)
    assert [call["num_warps"] for call in launched] == [8, 4, 2, 4]
    assert all(call["enable_fp_fusion"] is False and call["grid"] == (7,) for call in launched)
    tuning.launch(quantised_matmul_kernel, family, (7,), {**arguments, "M": 300})
    assert len(launched) == 5  # the same bucket
    tuning.launch(quantised_matmul_kernel, family, (7,), {**arguments, "N": 128, "TMA": False})
    assert len(launched) == 9
    assert len(allocators) == 2
    assert allocators[0](100, 128, None).shape == (100,)


def test_the_markdown_table_has_a_line_for_every_row() -> None:
    rows = [
        Row("a_kernel", "i8 16x16x16", 80, "mma.sync int8", 40, 0, 2048),
        Row("a_kernel", "i8 256x256x256", 86, pruned=True),
        Row("b_kernel", "f32", 90, problem="does not compile: no"),
    ]
    lines = markdown(rows).splitlines()
    assert lines[2] == "| a | i8 16x16x16 | sm_80 | mma.sync int8 | 40 | 0 | 2.0 | ok |"
    assert lines[3].endswith("| sm_86 |  |  |  |  | pruned |")
    assert lines[4].endswith("FAIL |")


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ahead_of_time.triton.knobs.runtime, "interpret", True)
    assert ahead_of_time.main(["--quick"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().out


def test_failures_are_a_sentence_each_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [Row("a_kernel", "i8", 80, registers=9), Row("b_kernel", "bf16", 90, problem="spills registers (2 instr.)")]
    monkeypatch.setattr(ahead_of_time.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(ahead_of_time, "run", lambda *_: rows)
    assert ahead_of_time.main(["--markdown", str(tmp_path / "table.md")]) == 1
    printed = capsys.readouterr().out
    assert "sm_90 b_kernel (bf16): spills registers (2 instr.)." in printed
    assert "2 compiled, 0 pruned, 1 failed." in printed
    assert "FAIL" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(ahead_of_time, "run", lambda *_: rows[:1])
    assert ahead_of_time.main([]) == 0
