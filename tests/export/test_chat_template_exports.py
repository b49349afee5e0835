"""A chat template goes along with every format, and its loss is noticed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitnet_train.export.writers import load_any_export
from tests.export.conftest import MakeRun, SmallRun, edit_json
from tests.export.gguf.raw import RawGguf, edit_gguf
from tests.export.hostile import refused

TEMPLATE = "{% for message in messages %}<{{ message.role }}>\n{{ message.content }} é{% endfor %}"
FORMATS = {
    "hf-packed": "2b4t",
    "hf-master": "2b4t",
    "hf-dense": "2b4t",
    "packed": "2b4t",
    "gguf-tq2_0": "wide silu",
    "gguf-i2_s": "half wide 2b4t",
}
every_format = pytest.mark.parametrize("format_name", FORMATS)


def with_template(run: SmallRun) -> SmallRun:
    return replace(run, tokenizer=replace(run.tokenizer, chat_template=TEMPLATE))


def set_template(folder: Path, template: str | None) -> None:
    """Another template, or none, where the folder keeps it."""

    def put(content: dict[str, Any]) -> None:
        key = "tokenizer.chat_template" if isinstance(content.get("general.architecture"), str) else "chat_template"
        content.pop(key, None)
        if template is not None:
            content[key] = template

    def edit(raw: RawGguf) -> None:
        put(raw.metadata)

    if list(folder.glob("*.gguf")):
        edit_gguf(folder, edit)
    elif (folder / "tokenizer_config.json").is_file():
        edit_json(folder / "tokenizer_config.json", put)
    else:
        edit_json(folder / "special_tokens.json", put)


@every_format
def test_it_is_read_back(format_name: str, small_run: MakeRun, tmp_path: Path) -> None:
    run = with_template(small_run(FORMATS[format_name]))
    assert load_any_export(run.write(tmp_path / "with", format_name))[1].chat_template == TEMPLATE
    plain = small_run(FORMATS[format_name]).write(tmp_path / "without", format_name)
    assert load_any_export(plain)[1].chat_template is None


@pytest.mark.parametrize(
    "format_name",
    [pytest.param(name, marks=pytest.mark.llama_cpp if name == "gguf-tq2_0" else []) for name in FORMATS],
)
def test_a_right_export_passes(format_name: str, small_run: MakeRun, tmp_path: Path) -> None:
    run = with_template(small_run(FORMATS[format_name]))
    assert not run.verify(run.write(tmp_path / "export", format_name), format_name).failed


@every_format
@pytest.mark.parametrize("template", [None, TEMPLATE.replace("role", "name")])
def test_another_template_is_rejected(
    template: str | None, format_name: str, small_run: MakeRun, tmp_path: Path
) -> None:
    run = with_template(small_run(FORMATS[format_name]))
    folder = run.write(tmp_path / "export", format_name)
    set_template(folder, template)
    failed = {check.name for check in run.verify(folder, format_name).failed}
    assert failed & {"config: tokenizer.chat_template"}


@every_format
def test_a_template_that_the_run_has_not_is_rejected(format_name: str, small_run: MakeRun, tmp_path: Path) -> None:
    run = small_run(FORMATS[format_name])
    folder = run.write(tmp_path / "export", format_name)
    set_template(folder, TEMPLATE)
    assert "config: tokenizer.chat_template" in {c.name for c in run.verify(folder, format_name).failed}


def test_a_gguf_file_without_one_lacks_the_key(small_run: MakeRun, tmp_path: Path) -> None:
    run = small_run("half wide 2b4t")
    (path,) = run.write(tmp_path / "without", "gguf-i2_s").glob("*.gguf")
    assert "tokenizer.chat_template" not in RawGguf.read(path).metadata
    (path,) = with_template(run).write(tmp_path / "with", "gguf-i2_s").glob("*.gguf")
    assert RawGguf.read(path).metadata["tokenizer.chat_template"] == TEMPLATE


def test_a_template_of_packed_that_is_no_text(small_run: MakeRun, tmp_path: Path) -> None:
    folder = small_run("2b4t").write(tmp_path / "export", "packed")
    edit_json(folder / "special_tokens.json", lambda content: content.update(chat_template=["x"]))
    refused(folder, "chat_template")


@pytest.mark.parametrize("content", ["[" * 100_000, json.dumps({"chat_template": {"a": 1}}), "", "[]"])
def test_a_damaged_tokenizer_config_does_no_harm(content: str, small_run: MakeRun, tmp_path: Path) -> None:
    folder = small_run("2b4t").write(tmp_path / "export")
    (folder / "tokenizer_config.json").write_text(content)
    assert load_any_export(folder)[1].chat_template is None
