"""Tokens per second and memory of generation from an export, beside transformers and llama.cpp.

    python benchmarks/generation.py [--shape 125m|2b] [--tokens 64] [--rounds 5] [--scratch FOLDER]

A model of random weights in the family that all of them run (SiLU, sub-norms, tied head) is exported once per format.
Every consumer then generates greedily from the same eight tokens, one text at a time, in a process of its own: a
warm-up, then `rounds` times; the figure is the median. Memory is the process's peak (VmHWM), imports included, and what
it grew by since the imports.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitnet_train.data.config import BpeTokenizer
from bitnet_train.data.tokenizer import train_bpe
from bitnet_train.evaluation.generate import generate_ids
from bitnet_train.export.canonical import open_checkpoint
from bitnet_train.export.config import ExportConfig, ExportDtype
from bitnet_train.export.gguf.plan import Container
from bitnet_train.export.writers import FORMATS, Job, load_any_export
from bitnet_train.kernels.backend import choose_backend
from bitnet_train.nn.code_cache import pack_kept_codes
from bitnet_train.nn.config import Activation, DecoderConfig
from bitnet_train.nn.layout import parameter_table
from bitnet_train.quant.spec import QuantSpec

SHAPES = {
    "125m": {"hidden": 768, "layers": 12, "heads": 12, "kv_heads": 12, "ffn": 2048, "vocab": 32000},
    "2b": {"hidden": 2560, "layers": 30, "heads": 20, "kv_heads": 5, "ffn": 6912, "vocab": 32000},
}
PROMPT = list(range(100, 108))
# Name -> the format it reads, and the type of what is not codes.
CONSUMERS = {
    "bitnet_train, packed codes": ("packed", ExportDtype.bfloat16),
    "bitnet_train, int8 codes": ("packed", ExportDtype.bfloat16),
    "transformers, hf-packed, float32": ("hf-packed", ExportDtype.float32),
    "transformers, hf-packed, bfloat16": ("hf-packed", ExportDtype.bfloat16),
    "transformers, hf-dense, bfloat16": ("hf-dense", ExportDtype.bfloat16),
    "llama.cpp, TQ2_0": ("gguf-tq2_0", ExportDtype.float32),
    "llama.cpp, TQ1_0": ("gguf-tq1_0", ExportDtype.float32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="125m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print("\n" + json.dumps(measure(options.child, options.scratch, options.tokens, options.rounds)))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        export_all(Path(folder), options.shape)
        print("| consumer | tokens/s | peak MB | grown by MB | model file MB |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for name in CONSUMERS:
            command = [sys.executable, __file__, "--scratch", folder, "--child", name]
            command += ["--tokens", str(options.tokens), "--rounds", str(options.rounds)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1][:80]} | | | |", flush=True)
                continue
            f = json.loads(done.stdout.splitlines()[-1])
            cells = f"{f['rate']:.1f} | {f['peak'] / 1e6:,.0f} | {f['grown'] / 1e6:,.0f} | {f['file'] / 1e6:,.1f}"
            print(f"| {name} | {cells} |", flush=True)


def export_all(folder: Path, shape: str) -> None:
    """One random checkpoint, and every export of it that a consumer reads."""
    cfg = DecoderConfig(context=1024, activation=Activation.silu, rope_theta=10000.0, **SHAPES[shape])
    generator = torch.Generator().manual_seed(0)
    state = {
        f"decoder.{p.name}": torch.empty(p.shape).normal_(0.0, 0.02, generator=generator)
        if len(p.shape) == 2
        else torch.ones(p.shape)
        for p in parameter_table(cfg)
    }
    torch.save({"state_dict": state, "global_step": 1}, folder / "last.ckpt")
    del state
    texts = [path.read_text(errors="ignore") for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    tokenizer = train_bpe(texts, BpeTokenizer(vocab_size=1000))
    canonical = open_checkpoint(folder / "last.ckpt", cfg, QuantSpec())
    for name, dtype in dict.fromkeys(CONSUMERS.values()):
        job = Job(canonical, tokenizer, "random", ExportConfig(dtype=dtype))
        FORMATS[name].write(job, folder / f"{name}-{dtype.value}")
    (folder / "last.ckpt").unlink()


def measure(name: str, scratch: Path, tokens: int, rounds: int) -> dict[str, float]:
    """Tokens per second, bytes of memory and of the model's files."""
    form, dtype = CONSUMERS[name]
    folder = scratch / f"{form}-{dtype.value}"
    library, _, _ = name.partition(",")
    loaders: dict[str, Callable[[Path, str], tuple[int, Callable[[int], int]]]] = {
        "bitnet_train": load_own,
        "transformers": load_transformers,
        "llama.cpp": load_llama_cpp,
    }
    before, generate = loaders[library](folder, name)
    generate(tokens)
    rates = []
    for _ in range(rounds):
        started = time.perf_counter()
        count = generate(tokens)
        rates.append(count / (time.perf_counter() - started))
    peak = memory("VmHWM")
    size = max(path.stat().st_size for path in folder.iterdir())
    return {"rate": statistics.median(rates), "peak": peak, "grown": peak - before, "file": size}


def load_own(folder: Path, name: str) -> tuple[int, Callable[[int], int]]:
    before = memory("VmRSS")
    model, _ = load_any_export(folder, "cpu", choose_backend("cpu").backend)
    if "packed codes" in name:
        pack_kept_codes(model)
    return before, lambda count: len(list(generate_ids(model, PROMPT, count)))


def load_transformers(folder: Path, name: str) -> tuple[int, Callable[[int], int]]:
    import transformers

    torch.compiler.set_stance("force_eager")  # its unpacking would be compiled for seconds and gain little
    before = memory("VmRSS")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = torch.tensor([PROMPT])

    def generate(count: int) -> int:
        options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "max_length": None}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), temperature=1.0, top_k=None, **options)
        return int(output.shape[1]) - len(PROMPT)

    return before, generate


def load_llama_cpp(folder: Path, name: str) -> tuple[int, Callable[[int], int]]:
    import llama_cpp

    before = memory("VmRSS")
    container = Container.tq2_0 if "TQ2_0" in name else Container.tq1_0
    threads = torch.get_num_threads()
    path = str(folder / container.file_name)
    model: Any = llama_cpp.Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(count: int) -> int:
        model.reset()
        stream = model.generate(PROMPT, temp=0.0)
        for _ in range(count):
            next(stream)
        return count

    return before, generate


def memory(field: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


if __name__ == "__main__":
    main()
