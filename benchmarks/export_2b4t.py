"""Exports of a model of BitNet b1.58 2B4T's size: time, memory and bytes of each format's writer.

    python benchmarks/export_2b4t.py [--scratch FOLDER] [--formats hf-packed,gguf-i2_s,...]

The weights are random and the tokenizer is a small one (the size of the vocabulary is the real one). Every format is
written by a process of its own, which reports its peak resident memory, split into what the mapped checkpoint takes
(pages of a file, which the system can drop at any time) and the rest. Needs 15 GB of disk for the scratch folder.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from bitnet_train.data.config import BpeTokenizer
from bitnet_train.data.tokenizer import train_bpe
from bitnet_train.export.canonical import open_checkpoint
from bitnet_train.export.config import EmbeddingType, ExportConfig, ExportDtype, Packing
from bitnet_train.export.writers import FORMATS, Job
from bitnet_train.nn.config import DecoderConfig
from bitnet_train.nn.layout import parameter_table
from bitnet_train.quant.spec import QuantSpec

SHAPE = DecoderConfig(
    hidden=2560, layers=30, heads=20, kv_heads=5, ffn=6912, context=4096, vocab=128256, rope_theta=500000.0
)
DEFAULT = ["hf-packed", "gguf-i2_s", "packed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--formats", default=",".join(DEFAULT))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\n" + json.dumps(write(options.child, options.scratch)))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        make_checkpoint(scratch / "last.ckpt")
        print(f"checkpoint: {(scratch / 'last.ckpt').stat().st_size / 1e9:.2f} GB of float32 master weights\n")
        print("| format | seconds | peak MB | of it mapped file MB | file MB | without embedding MB | bits per code |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for name in options.formats.split(","):
            command = [sys.executable, __file__, "--scratch", str(scratch), "--child", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            f = json.loads(done.stdout.splitlines()[-1])
            cells = [f"{f['seconds']:.0f}", *(f"{f[k] / 1e6:,.0f}" for k in ("peak", "mapped", "file", "codes"))]
            print(f"| {name} | {' | '.join(cells)} | {f['bits']:.3f} |", flush=True)


def make_checkpoint(path: Path) -> None:
    """A training checkpoint's weights, saved as Lightning does."""
    generator = torch.Generator().manual_seed(0)
    state = {
        f"decoder.{p.name}": torch.empty(p.shape).normal_(0.0, 0.02, generator=generator)
        if len(p.shape) == 2
        else torch.ones(p.shape)
        for p in parameter_table(SHAPE)
    }
    torch.save({"state_dict": state, "global_step": 1}, path)


def write(name: str, scratch: Path) -> dict[str, float]:
    """Write one format; seconds, bytes of memory and of files."""
    texts = [path.read_text(errors="ignore") for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    tokenizer = train_bpe(texts, BpeTokenizer(vocab_size=1000))
    cfg = ExportConfig(dtype=ExportDtype.bfloat16, embedding=EmbeddingType.f16, packing=Packing.base3)
    canonical = open_checkpoint(scratch / "last.ckpt", SHAPE, QuantSpec())
    peaks = {"peak": 0, "mapped": 0}
    ended = threading.Event()
    watcher = threading.Thread(target=watch, args=(peaks, ended))
    watcher.start()
    started = time.monotonic()
    FORMATS[name].write(Job(canonical, tokenizer, "2b4t", cfg), scratch / name)
    seconds = time.monotonic() - started
    ended.set()
    watcher.join()
    size = FORMATS[name].size(SHAPE, QuantSpec(), cfg)
    files = sum(file.stat().st_size for file in (scratch / name).iterdir())
    codes = size.total_bytes - size.embedding_bytes
    return {"seconds": seconds, **peaks, "file": files, "codes": codes, "bits": size.bits_per_code}


def watch(peaks: dict[str, int], ended: threading.Event) -> None:
    """Note resident memory at its peak, and how much of it then were pages of files."""
    while not ended.wait(0.05):
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        resident, mapped = (int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "RssFile"))
        if resident > peaks["peak"]:
            peaks.update(peak=resident, mapped=mapped)


if __name__ == "__main__":
    main()
