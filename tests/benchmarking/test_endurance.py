"""The miniature of a week-long run, shorter still: flat memory, no file left open, a folder that stays small."""

from pathlib import Path

import pytest

from benchmarks.endurance import Sample, endure, look, page, slope


def test_the_slope_is_that_of_the_line_after_the_warm_up() -> None:
    # 1,000 bytes per step from step 25 on; what is before does not count.
    samples = [Sample(step, 10**6 if step < 25 else 1000 * step, {"file": 3}, 5, 1) for step in range(0, 101, 5)]
    assert slope(samples) == pytest.approx(1000)
    assert "**1.00 MB per 1,000 steps**" in page(samples, 3.0, 100)


def test_a_look_counts_the_files_of_a_process(tmp_path: Path) -> None:
    import os

    (tmp_path / "step-00000001.ckpt").write_bytes(b"12345")
    before = look(os.getpid(), 1, tmp_path)
    with (tmp_path / "x").open("w"):
        during = look(os.getpid(), 1, tmp_path)
    assert before is not None
    assert during is not None
    assert during.files["file"] == before.files["file"] + 1
    assert (before.folder, before.checkpoints) == (5, 1)
    assert before.resident > 10**7
    assert look(2**22 + 1, 1, tmp_path) is None


@pytest.mark.slow
def test_memory_files_and_folder_stay_as_they_are(tmp_path: Path) -> None:
    samples, _ = endure(500, 50, tmp_path)
    assert len(samples) >= 5, "the run was too fast to be looked at"
    assert slope(samples) < 20_000, page(samples, 0, 500)  # 20 MB in 1,000 steps
    settled = samples[len(samples) // 2 :]
    assert max(s.open_files for s in settled) <= max(s.open_files for s in samples[:-1][: len(samples) // 2]) + 3
    assert all(s.checkpoints <= 4 for s in samples)  # keep=3, and one that has just come
    assert max(s.folder for s in settled) < 6 * samples[-1].folder / 3
