"""The files that the flips read: texts, conversations, images, a ternary run and an unquantised llama."""

import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from bitnet_train.__main__ import answer
from bitnet_train.data.config import BpeTokenizer
from bitnet_train.data.tokenizer import train_bpe
from tests.composing import fresh_recipes
from tests.conftest import make_text

TEXT = (
    "+recipe=tiny", "optimizer=adamw", "optimizer.lr=4e-3", "data=files", "data.corpus.path=@corpus@",
    "data.tokenizer.vocab_size=320",
    "data.sequence_length=32", "data.corpus.validation_every=10", "model.hidden=32", "model.layers=2", "model.heads=2",
    "model.kv_heads=2", "model.ffn=64", "trainer.batch_tokens=256", "samples.every_steps=null",
    "samples.max_new_tokens=8", "quant.gradient.dx=bf16", "quant.gradient.dw=bf16",
)  # fmt: skip
SHORT = (
    "trainer.max_steps=4", "trainer.validate_every=4", "trainer.log_every=1", "trainer.compile=false",
    "trainer.precision=32-true", "checkpoint.every_steps=null", "telemetry.every_steps=null", "schedule.warmup=0",
    "kernels.backend=reference", "paths.data=@data@", "paths.runs=@runs@",
)  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
TEMPLATE2 = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}"


class Place:
    """A folder; ``fill("@corpus@")`` is the path of what is called so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        _write_texts(folder)
        _write_tables(folder)
        _write_images(folder)
        self._train_models()

    def fill(self, setting: str) -> str:
        """``setting`` with paths in the place of ``@name@``."""
        for name in ("new2", "new", "data", "runs", *sorted(p.name for p in self.folder.iterdir())):
            place = self.folder / name
            if name in ("new", "new2", "runs"):
                place = self.folder / "results" / str(self.count) / name
            setting = setting.replace(f"@{name}@", str(place))
        return setting

    def answer(self, *arguments: str) -> tuple[int, str]:
        """The exit code of a command line and all that it printed, with this folder's name left out."""
        output = StringIO()
        with fresh_recipes(), redirect_stdout(output), redirect_stderr(output):
            code = answer([self.fill(argument) for argument in arguments])
        return code, output.getvalue().replace(str(self.folder), "")

    def _train_models(self) -> None:
        kept = ("checkpoint.every_steps=3", "paths.runs=@models@", "checkpoint.keep=3")
        float_llama = ("quant=none", "model.norms=pre", "init.sub_norm_gain=1", "model.activation=silu")
        (self.folder / "models").mkdir()
        wide = ("model.hidden=256", "model.ffn=256", "model.activation=silu", "trainer.max_steps=3")
        for name, settings in {
            "run": (), "llama_run": float_llama, "llama2_run": (*float_llama, "seed=5"), "wide_run": wide,
        }.items():  # fmt: skip
            code, output = self.answer(*TEXT, *SHORT, *kept, *settings, f"run_name={name}")
            assert code == 0, output
            shutil.move(self.folder / "models" / name, self.folder / name)
        for name in ("llama", "llama2"):
            code, output = self.answer("command=export", f"run=@{name}_run@", "export.formats=[hf-dense]")
            assert code == 0, output
            (self.folder / name).symlink_to(self.folder / f"{name}_run" / "export" / "hf-dense")


def _write_texts(folder: Path) -> None:
    for name, first in (("corpus", 0), ("other", 40)):
        (folder / name).mkdir()
        for i in range(first, first + 40):
            lines = [f"line {j} of text {i}: {'abc' * (j % 5)} the quick brown fox {i * j}\n" for j in range(30)]
            (folder / name / f"{i:02d}.txt").write_text("".join(lines))
    (folder / "prompts").write_text("the quick\nbrown fox\n")
    for name, first in (("words.json", 0), ("words2.json", 30)):
        tokenizer = train_bpe([make_text(i) for i in range(first, first + 30)], BpeTokenizer(vocab_size=320))
        tokenizer.tokenizer.add_special_tokens(["<|other|>"])
        tokenizer.tokenizer.save(str(folder / name))


def _write_tables(folder: Path) -> None:
    texts = [make_text(i) for i in range(40)]
    rows = [{"text": text, "other": text.upper()} for text in texts]
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, shift in (("hub", 0), ("hub2", 1)):
        for split in ("train", "test"):
            moved = texts[shift + (split == "test") :]
            table = datasets.Dataset.from_dict({"text": moved, "other": [text.upper() for text in moved]})
            table.to_parquet(str(folder / name / f"{split}.parquet"))
        splits = "[{split: train, path: FILE}, {split: test, path: test.parquet}]"
        configs = [f"{{config_name: {c}, data_files: {splits.replace('FILE', f)}}}" for c, f in
                   (("a", "train.parquet"), ("b", "test.parquet"))]  # fmt: skip
        (folder / name / "README.md").write_text(f"---\nconfigs: [{', '.join(configs)}]\n---\n")
    (folder / "talks").mkdir()
    for name, shift in (("chats.jsonl", 0), ("chats2.jsonl", 7)):
        lines = []
        for i in range(shift, shift + 40):
            asked, answered = {"role": "user", "content": texts[i % 40]}, {"role": "assistant", "content": f"yes {i}"}
            lines.append(json.dumps({"messages": [asked, answered], "talk": [asked, answered] * 2}) + "\n")
        for where in (folder, folder / "talks"):
            (where / name).write_text("".join(lines))
    (folder / "template").write_text(TEMPLATE)
    (folder / "template2").write_text(TEMPLATE2)


def _write_images(folder: Path) -> None:
    def pictures(seed: int, count: int) -> list[Image.Image]:
        random = np.random.default_rng(seed)
        return [Image.fromarray(random.integers(0, 256, (6, 6), np.uint8)) for _ in range(count)]

    kinds = datasets.Value("int64")
    features = datasets.Features(
        {"image": datasets.Image(), "picture": datasets.Image(), "label": kinds, "kind": kinds}
    )
    for name, seed in (("images", 0), ("images2", 100)):
        for number, split in enumerate(("train", "test", "more")):
            count = 48 + 8 * number
            columns = {
                "image": pictures(seed + number, count), "picture": pictures(seed + number + 50, count),
                "label": [i % 4 for i in range(count)], "kind": [(i // 2) % 4 for i in range(count)],
            }  # fmt: skip
            table = datasets.Dataset.from_dict(columns, features=features)
            table.to_parquet(str(folder / name / f"{split}.parquet"))
        listed = ", ".join(f"{{split: {split}, path: FILE-{split}}}" for split in ("train", "test", "more"))
        a = listed.replace("FILE-", "").replace("}", ".parquet}")
        b = a.replace("path: train.parquet", "path: more.parquet")
        (folder / name / "README.md").write_text(
            f"---\nconfigs: [{{config_name: a, data_files: [{a}]}}, {{config_name: b, data_files: [{b}]}}]\n---\n"
        )
