"""docs/faults.md: every line names a test that there is."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = [line for line in (ROOT / "docs/faults.md").read_text().splitlines() if line.startswith("| ")][2:]


def test_the_table_is_there() -> None:
    assert len(LINES) > 25


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[2:40])
def test_each_line_is_held_by_a_test(line: str) -> None:
    cells = [cell.strip() for cell in line.strip("|").split(" | ")]
    assert len(cells) == 6
    assert all(cells)
    assert set(re.findall(r"\d+", cells[4])) <= {"0", "1", "2", "3", "5", "130", "143"}
    file, _, name = cells[5].strip("` ").partition("::")
    found = list((ROOT / "tests").rglob(file))
    assert len(found) == 1, file
    assert not name or f"def {name}(" in found[0].read_text()
