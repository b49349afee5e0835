"""Keys and tokens are in no file of a run, in no message and in no configuration."""

from pathlib import Path

import pytest

from bitnet_train.__main__ import answer
from bitnet_train.secrets import is_secret, masked, masked_all
from bitnet_train.training.provenance import collect_provenance
from tests.composing import fresh_recipes

KEY = "7f3e9c2b1a" * 4
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse battery")
    monkeypatch.setenv("MAX_TOKENS", "4096409640964096")
    monkeypatch.setenv("AZURE_STORAGE_KEY", "9f8e7d6c5b4a")
    monkeypatch.setenv("SSH_KEY", "/home/me/.ssh/id_rsa")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"key {KEY} is refused", "key *** is refused"),
        (f"https://user:{TOKEN}@huggingface.co/x", "https://***@huggingface.co/x"),
        ("https://me:pa55word@host/x", "https://***@host/x"),
        ("hf_0123456789abcdefghijklmnopq", "***"),
        ("sk-proj-0123456789abcdefghijklmn", "***"),
        ("ghp_0123456789abcdefghijklmn", "***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("the password is correct horse battery", "the password is ***"),
        ("wandb_api_key=abc123def456", "wandb_api_key=***"),
        ('{"token": "abc123def456"}', '{"token": "***"}'),
        ("export WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567", "export WANDB_API_KEY=***"),
        ("glpat-0123456789abcdefghij", "***"),
        ("AIzaSyA0123456789abcdefghijklmnopqrstuv", "***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N", "***"),
        (
            "https://x.blob.core.windows.net/c/f?sv=2020&sig=abcdEFGH1234%2Bxyz99",
            "https://x.blob.core.windows.net/c/f?sv=2020&sig=***",
        ),
        ("https://u:pa/ss@host/x", "https://***@host/x"),
        ("-----BEGIN RSA PRIVATE KEY-----", "***"),
        ("key is 9f8e7d6c5b4a", "key is ***"),
        # What only looks like one.
        ("http://localhost:8080/files/a@b",) * 2,
        ("ssh /home/me/.ssh/id_rsa",) * 2,
        ("trainer.batch_tokens=4096", "trainer.batch_tokens=4096"),
        ("data.tokenizer.bos='<|endoftext|>'", "data.tokenizer.bos='<|endoftext|>'"),
        ("data.tokenizer.revision=0123456789abcdef0123456789abcdef01234567",) * 2,
        ("max_tokens 4096409640964096",) * 2,
        ("eos_token=<|endoftext|>",) * 2,
        ("runs/tiny/checkpoints/step-00000003.ckpt (step 3)",) * 2,
        ("s3://bucket/folder@2024",) * 2,
    ],
)
def test_secrets_are_masked_and_nothing_else(text: str, hidden: str) -> None:
    assert masked(text) == hidden


def test_lists_are_masked_word_by_word() -> None:
    assert masked_all(["a", Path("b"), f"x={TOKEN}"]) == ["a", "b", "x=***"]
    assert is_secret(f"https://{KEY}@host")
    assert not is_secret("runs/tiny")


@pytest.mark.parametrize(
    "setting",
    [
        f"data.corpus.path=https://user:{TOKEN}@huggingface.co/datasets/x",
        f"logger.project={KEY}",
        "logger.project='${oc.env:WANDB_API_KEY}'",
        f"logger.tags=[a,{KEY}]",
        "cluster.setup=['export OTHER_API_KEY=0123456789abcdef0123456789abcdef01234567']",
    ],
)
def test_a_setting_with_a_secret_is_refused_without_showing_it(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with fresh_recipes():
        assert answer(["+recipe=tiny", "data=files", "logger=wandb", setting]) == 2
    error = capsys.readouterr().err
    assert f"{setting.partition('=')[0]} holds a key, a token or a password" in error
    assert KEY not in error
    assert TOKEN not in error
    assert not list(tmp_path.iterdir())


def test_what_is_said_about_a_wrong_setting_hides_the_secret(capsys: pytest.CaptureFixture[str]) -> None:
    with fresh_recipes():
        assert answer(["+recipe=tiny", f"seed={TOKEN}"]) == 2
        assert answer(["+recipe=tiny", f"+wandb_key.{KEY}={KEY}"]) == 2
        assert answer(["+recipe=tiny", f"trainer.precision={KEY}", "command=estimate"]) == 2
    error = capsys.readouterr().err
    assert "***" in error
    assert TOKEN not in error
    assert KEY not in error


def test_provenance_hides_what_the_command_line_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bitnet_train", "+recipe=tiny", f"logger.project={TOKEN}", f"token={KEY}"])
    text = str(collect_provenance({}))
    assert "logger.project=***" in text
    assert TOKEN not in text
    assert KEY not in text
