"""Every run leaves a page; ``command=report`` makes one of a sweep."""

import pytest

from tests.training.conftest import Workspace


@pytest.mark.usefixtures("pages")
def test_a_sweep_leaves_a_page_per_run_and_one_of_all(workspace: Workspace) -> None:
    code, output = workspace.run("-m", "optimizer.eps=1e-8,1e-6", "run_name=s", "trainer.max_steps=5")
    assert code == 0, output
    sweep = workspace.folder / "runs" / "s"
    pages = {path.parent.name: path.read_text() for path in sweep.glob("*/report.html")}
    assert len(pages) == 2
    assert all("Bits per byte of held-out text" in page for page in pages.values())
    code, output = workspace.run("command=report", "run=runs/s")
    assert code == 0, output
    assert "written: runs/s/report.html" in output
    page = (sweep / "report.html").read_text()
    assert "They differ in optimizer.eps." in page
    assert all(name in page for name in pages)
    (sweep / next(iter(pages)) / "report.html").unlink()
    code, output = workspace.run("command=report", f"run=runs/s/{next(iter(pages))}")
    assert code == 0, output
    assert (sweep / next(iter(pages)) / "report.html").is_file()
    (workspace.folder / "empty").mkdir()
    code, output = workspace.run("command=report", "run=empty")
    assert code == 2
    assert "neither a run" in output
