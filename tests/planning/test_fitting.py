"""The arithmetic behind trainer.micro_batch=auto, and the memory that the system says is free."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_train.planning import estimate as estimate_module
from bitnet_train.planning.estimate import assumed_micro_batch
from bitnet_train.planning.fitting import MemoryLine, climb, divisors
from bitnet_train.planning.machine_memory import available_memory
from bitnet_train.planning.memory import training_memory
from bitnet_train.quant.spec import build_spec
from tests.composing import compose_config


@given(st.integers(1, 3000))
def test_divisors(number: int) -> None:
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_a_line_goes_through_the_smallest_and_the_largest_size() -> None:
    line = MemoryLine.through({1: 110, 2: 125, 4: 140})
    assert (line.fixed, line.per_sequence) == (100, 10)
    assert line.at(30) == 400
    assert line.largest([1, 2, 4, 8, 16], 180) == 8
    assert line.largest([1, 2], 109) is None


@pytest.mark.parametrize(("peaks", "fixed", "slope"), [({3: 30}, 0, 10), ({1: 9, 2: 8}, 8, 0), ({1: 1, 4: 40}, 0, 10)])
def test_no_part_of_a_line_is_negative(peaks: dict[int, int], fixed: float, slope: float) -> None:
    line = MemoryLine.through(peaks)
    assert (line.fixed, line.per_sequence) == (fixed, slope)


def machine(fixed: int, each: int, full: int) -> tuple[list[int], Callable[[int], int | None]]:
    """Sizes in the order they are tried, and a measurement that runs out of memory above ``full`` bytes."""
    asked: list[int] = []

    def measure(size: int) -> int | None:
        asked.append(size)
        used = fixed + each * size
        return used if used <= full else None

    return asked, measure


@given(
    st.sampled_from([1, 7, 12, 64, 360]),
    st.integers(0, 50),
    st.integers(1, 20),
    st.integers(1, 3000),
    st.integers(5, 20),
)
def test_climbing_finds_the_largest_size_that_fits(number: int, fixed: int, each: int, budget: int, off: int) -> None:
    sizes = divisors(number)
    # The line promises 0.5 to 2 times what a sequence really takes.
    tried = climb(sizes, MemoryLine(fixed, each * off / 10), budget, machine(fixed, each, budget * 11 // 10)[1])
    fitting = [size for size, used in tried.items() if used is not None]
    assert max(fitting, default=None) == MemoryLine(fixed, each).largest(sizes, budget)


def test_climbing_asks_no_more_than_it_must() -> None:
    sizes = divisors(64)
    asked, measure = machine(100, 10, 1000)
    assert climb(sizes, MemoryLine(100, 10), 500, measure) == {32: 420}
    assert asked == [32]
    asked, measure = machine(100, 20, 1000)  # twice the promised: one size down
    assert climb(sizes, MemoryLine(100, 10), 500, measure) == {32: None, 16: 420}
    asked, measure = machine(100, 5, 1000)  # half of it: one up
    assert climb(sizes, MemoryLine(100, 10), 500, measure) == {32: 260, 64: 420}
    asked, measure = machine(600, 10, 10**9)
    assert set(climb(sizes, MemoryLine(100, 10), 500, measure).values()) == {None}
    assert asked == [32, 16, 8, 4, 2, 1]


MEMINFO = "MemTotal:       24684092 kB\nMemFree:        19600576 kB\nMemAvailable:   1000 kB\n"


def system(root: Path, **files: str) -> Path:
    for name, text in {"proc__meminfo": MEMINFO, **files}.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


UNIFIED, V1 = "sys__fs__cgroup", "sys__fs__cgroup__memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1_024_000),
        # The limit of the job's own cgroup; page cache counts as free.
        (
            {
                "proc__self__cgroup": "0::/slurm/job_1\n",
                f"{UNIFIED}__slurm__job_1__memory.max": "700000\n",
                f"{UNIFIED}__slurm__job_1__memory.current": "500000\n",
                f"{UNIFIED}__slurm__job_1__memory.stat": "anon 400000\ninactive_file 50000\n",
            },
            250_000,
        ),
        # No limit of its own, but one above it.
        (
            {
                "proc__self__cgroup": "0::/slurm/job_1\n",
                f"{UNIFIED}__slurm__job_1__memory.max": "max\n",
                f"{UNIFIED}__slurm__job_1__memory.current": "500000\n",
                f"{UNIFIED}__slurm__memory.max": "900000\n",
                f"{UNIFIED}__slurm__memory.current": "600000\n",
            },
            300_000,
        ),
        # A container: the path is the host's, the files are at the mount's root.
        (
            {
                "proc__self__cgroup": "0::/../../docker/abc\n",
                f"{UNIFIED}__memory.max": "80000\n",
                f"{UNIFIED}__memory.current": "90000\n",
            },
            0,
        ),
        # Version 1 beside an empty version 2.
        (
            {
                "proc__self__cgroup": "5:cpu:/x\n4:hugetlb,memory:/box\n0::/\n",
                f"{V1}__box__memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}__box__memory.usage_in_bytes": "1\n",
                f"{V1}__memory.limit_in_bytes": "600000\n",
                f"{V1}__memory.usage_in_bytes": "200000\n",
                f"{V1}__memory.stat": "inactive_file 1\ntotal_inactive_file 40000\n",
            },
            440_000,
        ),
        # A limit above what the machine has says nothing.
        (
            {
                "proc__self__cgroup": "0::/\n",
                f"{UNIFIED}__memory.max": "90000000\n",
                f"{UNIFIED}__memory.current": "0\n",
            },
            1_024_000,
        ),
    ],
)
def test_the_smaller_of_kernel_and_cgroups(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_memory(system(tmp_path, **files)) == expected


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    assert available_memory(tmp_path) is None


def test_the_estimate_takes_auto_for_what_fits_into_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose_config("+recipe=125m", "trainer.micro_batch=auto", "trainer.accelerator=cpu")
    spec, length = build_spec(cfg.quant), cfg.data.sequence_length

    def need(size: int) -> int:
        return training_memory(cfg.model, spec, size, length, cfg.trainer.precision).total

    for free, size, said in (
        (need(8) / 0.8 + 1, 8, "80% of the"),
        (need(8) / 0.8 - 1e6, 4, "80% of the"),
        (need(1) / 2, 1, "not even one sequence fits"),
        (None, cfg.trainer.batch_tokens // length, "does not tell its memory"),
    ):
        monkeypatch.setattr(estimate_module, "available_memory", lambda free=free: free)
        trainer, assumption = assumed_micro_batch(cfg)
        assert trainer.micro_batch == size
        assert assumption is not None
        assert said in assumption
    on_gpu = compose_config("+recipe=125m", "trainer.micro_batch=auto", "trainer.accelerator=cuda")
    trainer, assumption = assumed_micro_batch(on_gpu)
    assert trainer.micro_batch == cfg.trainer.batch_tokens // length
    assert assumption is not None
    assert "the GPU decides" in assumption
    given_number = compose_config("+recipe=125m", "trainer.micro_batch=2")
    assert assumed_micro_batch(given_number) == (given_number.trainer, None)
