"""Checkpoints that are truncated, damaged, missing or hostile: a run goes on from the newest whole one, and says so."""

import os
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from bitnet_train.durable import check_archive
from bitnet_train.training.callbacks.checkpoint import point_last_to, prune, write_archive
from tests.training.conftest import InProcess, write_corpus

RUN = ("run_name=a", "schedule=constant", "samples.every_steps=2", "checkpoint.keep=3")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a of 9 steps (last.ckpt is step 9; 3 and 6 are there), and b, the same run of 12 steps, undisturbed."""
    folder = tmp_path_factory.mktemp("template")
    write_corpus(folder)
    for name, steps in (("a", 9), ("b", 12)):
        code, output = InProcess(folder).run(*RUN[1:], f"run_name={name}", f"trainer.max_steps={steps}")
        assert code == 0, output
    return folder


class Linked(InProcess):
    """A place whose corpus is named as it was when it was prepared."""

    def __init__(self, folder: Path, template: Path) -> None:
        super().__init__(folder)
        self.template = template

    def command(self, *arguments: str) -> list[str]:
        here, there = f"{self.folder}/corpus", f"{self.template}/corpus"
        return [line.replace(here, there) for line in super().command(*arguments)]


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Linked:
    """A copy of it; the corpus and the shards stay where they are."""
    (tmp_path / "data").symlink_to(template / "data")
    shutil.copytree(template / "runs", tmp_path / "runs")
    for run in ("a", "b"):
        folder = tmp_path / "runs" / run / "checkpoints"
        point_last_to(max(folder.glob("step-*")))  # a copy of a tree has no hard links
    return Linked(tmp_path, template)


@pytest.fixture
def trained(place: InProcess) -> Path:
    """The checkpoints of run a."""
    return place.folder / "runs/a/checkpoints"


def flip_a_byte(path: Path) -> None:
    """A bit of a weight, in the middle of the largest record; the file is a copy, not a hard link, afterwards."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
        place = largest.header_offset + 512 + largest.file_size // 2
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def of_something_else(path: Path) -> None:
    torch.save({"hello": 1}, path)


class Evil:
    """Unpickled by somebody careless, it leaves a file."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("/tmp/bitnet_train_was_here",)


def malicious(path: Path) -> None:
    torch.save({"global_step": 9, "state_dict": {}, "x": Evil()}, path)


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, empty, of_something_else, malicious])
def test_a_broken_last_falls_back_to_the_step_before_and_ends_the_same(
    place: InProcess, trained: Path, damage: object
) -> None:
    # last.ckpt and step 9 are one file.
    damage(trained / "last.ckpt")  # type: ignore[operator]
    code, output = place.run(*RUN, "trainer.max_steps=12")
    assert code == 0, output
    warnings = [line for line in output.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert "last.ckpt: " in warnings[0]
    assert warnings[0].endswith("using step-00000006.ckpt")
    assert "steps 6 to 12" in output
    assert not Path("/tmp/bitnet_train_was_here").exists()
    whole = {step: row[0] for step, row in place.losses("b").items()}
    assert {step: row[0] for step, row in place.losses("a").items()} == whole
    texts = [(place.folder / "runs" / run / "samples.md").read_text() for run in "ab"]
    assert texts[0] == texts[1]
    assert sorted(p.name for p in trained.glob("*")) == [
        "last.ckpt", "step-00000006.ckpt", "step-00000009.ckpt", "step-00000012.ckpt"
    ]  # fmt: skip
    check_archive(trained / "step-00000009.ckpt")  # was written again


def test_a_missing_last_is_found_again_in_the_steps(place: InProcess, trained: Path) -> None:
    (trained / "last.ckpt").unlink()
    code, output = place.run(*RUN, "trainer.max_steps=10")
    assert code == 0, output
    assert "last.ckpt is missing: using step-00000009.ckpt" in output
    assert "steps 9 to 10" in output


def test_a_kill_between_the_step_and_last_loses_nothing(place: InProcess, trained: Path) -> None:
    # As after a kill: step 9 is there, last.ckpt still is step 6.
    (trained / "last.ckpt").unlink()
    os.link(trained / "step-00000006.ckpt", trained / "last.ckpt")
    code, output = place.run(*RUN, "trainer.max_steps=10")
    assert code == 0, output
    assert "last.ckpt is of an earlier step: using step-00000009.ckpt" in output
    assert "steps 9 to 10" in output


def test_a_last_that_someone_copied_there_counts(place: InProcess, trained: Path) -> None:
    shutil.copyfile(trained / "step-00000003.ckpt", trained / "copy")
    (trained / "copy").replace(trained / "last.ckpt")
    code, output = place.run(*RUN, "trainer.max_steps=10")
    assert code == 0, output
    assert "steps 3 to 10" in output


def test_all_broken_is_one_sentence_and_nothing_is_deleted(place: InProcess, trained: Path) -> None:
    for path in trained.glob("step-*"):
        flip_a_byte(path)
    before = {p.name: p.stat().st_size for p in trained.iterdir()}
    metrics = (trained.parent / "metrics.csv").read_text()
    for command in ((*RUN, "trainer.max_steps=12"), ("command=export", "run=runs/a")):
        code, output = place.run(*command)
        assert code == 2
        said = output.strip().splitlines()[-1]
        assert said.startswith("bitnet_train: Every checkpoint in runs/a/checkpoints is broken (last.ckpt: ")
        assert "a checksum does not match" in said
        assert said.endswith("nothing was deleted.")
        assert "Traceback" not in output
    assert {p.name: p.stat().st_size for p in trained.iterdir()} == before
    assert (trained.parent / "metrics.csv").read_text() == metrics


def test_commands_on_a_run_read_the_newest_whole_checkpoint(place: InProcess, trained: Path) -> None:
    flip_a_byte(trained / "last.ckpt")
    code, output = place.run("command=generate", "run=runs/a", "generate.max_new_tokens=4")
    assert code == 0, output
    assert "using step-00000006.ckpt" in output
    code, output = place.run("command=export", "run=runs/a", "export.formats=[packed]", "export.verify_tokens=64")
    assert code == 0, output
    assert "(step 6)" in output


def test_a_fork_or_a_start_from_a_broken_step_is_refused(place: InProcess, trained: Path) -> None:
    flip_a_byte(trained / "step-00000006.ckpt")
    code, output = place.run(*RUN[1:], "run_name=c", "trainer.max_steps=12", "resume.from=runs/a@6")
    assert code == 2
    assert "step-00000006.ckpt cannot be read (a checksum does not match)" in output
    code, output = place.run(*RUN[1:], "run_name=d", "trainer.max_steps=12", "init.from=runs/a@6")
    assert code == 2
    assert "step-00000006.ckpt cannot be read (a checksum does not match)" in output


def test_every_bit_of_every_record_is_covered(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    write_archive({"global_step": 1, "state_dict": {"w": torch.arange(50.0), "b": torch.ones(3)}}, path)
    check_archive(path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        for record in records:
            with archive.open(record) as stream:
                content = stream.read()
            start = record.header_offset + 30 + sum(struct.unpack_from("<HH", whole, record.header_offset + 26))
            assert whole[start : start + len(content)] == content
            for byte in range(start, start + len(content), max(1, len(content) // 7)):
                damaged = bytearray(whole)
                damaged[byte] ^= 1
                path.write_bytes(damaged)
                with pytest.raises(ValueError, match="checksum"):
                    check_archive(path)
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated"):
            check_archive(path)
    path.write_bytes(whole)
    check_archive(path)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="compressed"):
        check_archive(path)


def test_pruning_keeps_the_newest_good_one_whatever_else_lies_there(tmp_path: Path) -> None:
    def there() -> list[int]:
        return sorted(int(p.stem[5:]) for p in tmp_path.glob("step-*.ckpt"))

    for step in (3, 6, 9, 12):
        (tmp_path / f"step-{step:08d}.ckpt").write_bytes(b"x")
    # Step 6 was just written by a run that went back from broken ones of 9 and 12.
    prune(tmp_path, tmp_path / "step-00000006.ckpt", 2)
    assert there() == [3, 6]
    for step in (9, 12):
        (tmp_path / f"step-{step:08d}.ckpt").write_bytes(b"x")
    prune(tmp_path, tmp_path / "step-00000006.ckpt", 1)
    assert there() == [6]
    point_last_to(tmp_path / "step-00000006.ckpt")
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "step-00000006.ckpt")
