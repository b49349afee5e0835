"""A disk that is full while a run trains, prepares or exports: what is saved stays whole, the same command goes on."""

import subprocess
from pathlib import Path

import pytest

from bitnet_train.durable import check_archive
from tests.faults.conftest import RUN, Disk, Figures, Place, figures

# Where nothing can be mounted, files that cannot grow stand in for a full disk.
both = pytest.mark.parametrize("disk", ["tmpfs", "file-size-limit"], indirect=True)


@both
def test_no_room_for_a_checkpoint_stops_the_run_and_it_goes_on_when_there_is(
    place: Place, disk: Disk, whole: Figures
) -> None:
    command = (*RUN, "run_name=a", f"paths.runs={disk.folder}/runs")
    place.at_step[5] = disk.fill
    said = place.refused(*command)
    folder = disk.folder / "runs/a/checkpoints"
    assert f"The checkpoint of step 6 cannot be written to {folder}" in said
    assert "free space; " in said
    assert f"{folder}/step-00000003.ckpt is intact, and the same command goes on from it" in said
    disk.free()
    assert sorted(p.name for p in folder.iterdir()) == ["last.ckpt", "step-00000003.ckpt"]
    check_archive(folder / "last.ckpt")
    assert "steps 3 to 9" in place.done(*command)
    assert figures(disk.folder / "runs/a") == whole


@both
def test_rows_of_metrics_wait_for_room_and_none_is_lost(place: Place, disk: Disk) -> None:
    command = (*RUN, "run_name=a", f"paths.runs={disk.folder}/runs", "checkpoint.every_steps=null")
    place.at_step = {1: disk.fill, 8: disk.free}
    output = place.done(*command, "samples.every_steps=null", "telemetry.every_steps=null")
    if not disk.mounted:  # on a tmpfs the first page takes some rows
        assert "metrics.csv is not written (File too large): its rows wait" in output
        assert "metrics.csv is written again; no row is lost" in output
    rows = (disk.folder / "runs/a/metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", *map(str, range(1, 10))]


def test_no_room_for_samples_and_layers_costs_no_step(place: Place, disk: Disk, whole: Figures) -> None:
    command = (*RUN, "run_name=a", f"paths.runs={disk.folder}/runs", "samples.max_new_tokens=90",
               "checkpoint.every_steps=null")  # fmt: skip
    place.at_step = {2: disk.fill, 8: disk.free}
    output = place.done(*command, "samples.prompts=[a,b,c,d,e,f,g,h,i,j,k,l]")
    for name in ("samples.md", "layers.csv"):
        assert output.count(f"{name} is not written") == 1
    assert "training goes on without it" in output
    assert figures(disk.folder / "runs/a")[0] == whole[0]


def test_no_room_for_shards_leaves_nothing_behind(place: Place, disk: Disk) -> None:
    command = ("command=prepare", f"paths.data={disk.folder}/data")
    disk.fill(leave=16384)
    said = place.refused(*command)
    assert f"The token shards {disk.folder}/data/files-bpe320-" in said
    assert "free space or choose another paths.data" in said
    disk.free()
    assert list((disk.folder / "data").iterdir()) == []
    place.done(*command)
    disk.fill(leave=16384)
    assert "what was there before is as it was" in place.refused(*command, "data.rebuild=true")
    disk.free()
    assert "fingerprint" in place.done(*command)


def test_no_room_for_an_export_leaves_the_one_before(place: Place, disk: Disk) -> None:
    place.done(*RUN, "run_name=a", f"paths.runs={disk.folder}/runs")
    export = ("command=export", f"run={disk.folder}/runs/a", "export.verify_tokens=64")
    for name in ("packed", "hf-master"):
        disk.fill(leave=12288)
        said = place.refused(*export, f"export.formats=[{name}]")
        assert f"The export {disk.folder}/runs/a/export/{name} cannot be written: " in said
        disk.free()
        assert list((disk.folder / "runs/a/export").iterdir()) == []
    place.done(*export, "export.formats=[packed]")
    before = {p.name: p.read_bytes() for p in (disk.folder / "runs/a/export/packed").iterdir()}
    disk.fill(leave=12288)
    place.refused(*export, "export.formats=[packed]")
    disk.free()
    after = {p.name: p.read_bytes() for p in (disk.folder / "runs/a/export/packed").iterdir()}
    assert after == before
    assert [p.name for p in (disk.folder / "runs/a/export").iterdir()] == ["packed"]


def test_no_room_at_all_is_said_before_anything_is_computed(place: Place, disk: Disk) -> None:
    place.done("command=prepare")
    (disk.folder / "runs/a").mkdir(parents=True)
    disk.fill()
    said = place.refused(*RUN, "run_name=a", f"paths.runs={disk.folder}/runs")
    assert "cannot be read or written (" in said
    assert "config.yaml" in said
    disk.free()
    place.done(*RUN, "run_name=a", f"paths.runs={disk.folder}/runs")


def test_a_full_disk_under_the_output_stops_nothing(place: Place) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    command = place.command(*RUN, "run_name=a", "samples.every_steps=null", "telemetry.every_steps=null")
    with Path("/dev/full").open("w") as full:
        code = subprocess.run(command, cwd=place.folder, stdout=full, stderr=subprocess.PIPE, timeout=300)
    assert code.returncode == 0, code.stderr.decode()
    assert (place.folder / "runs/a/checkpoints/step-00000009.ckpt").exists()
    # A reader that is gone: the pipe breaks.
    process = subprocess.Popen(
        [*command, "run_name=b"], cwd=place.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
