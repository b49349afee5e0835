"""Compiles every kernel in every form it is launched in, for every GPU generation, on a machine without a GPU.

    python -m bitnet_train.kernels.triton.ahead_of_time [--quick] [--markdown FILE] [--jobs N]

What is held: it compiles; it uses the tensor-core instruction meant for that generation; it spills no registers; it
fits in the generation's shared memory; kernels that decide codes contain neither a fused multiply-add nor an inexact
division. A tile that is not held is one that the autotuner prunes there. Exits with 1 when anything fails.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bitnet_train.kernels.triton.specialisation import Specialisation
from bitnet_train.kernels.triton.tuning import KIB, TiledSpecialisation, shared_memory_limit

MODULES = ("activations", "weights", "gradients", "matmul", "weight_gradient")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
QUICK_ARCHITECTURES = (80, 90)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# The tensor-core instructions in PTX, by family: of Ampere, Ada and consumer Blackwell; of Hopper; of Blackwell.
MMA = {"int8": r"mma\.sync\S*\.s8\.s8", "fp8": r"mma\.sync\S*\.e4m3\.e4m3", "bf16": r"mma\.sync\S*\.bf16\.bf16"}
WGMMA = {
    "int8": r"wgmma\.mma_async\S*\.s8\.s8",
    "fp8": r"wgmma\.mma_async\S*\.e4m3\.e4m3",
    "bf16": r"wgmma\.mma_async\S*\.bf16\.bf16",
}
TCGEN05 = {
    "int8": r"tcgen05\.mma\S*kind::i8",
    "fp8": r"tcgen05\.mma\S*kind::f8f6f4",
    "bf16": r"tcgen05\.mma\S*kind::f16",
}
NEWEST = {8: ("mma.sync", MMA), 9: ("wgmma", WGMMA), 10: ("tcgen05", TCGEN05), 12: ("mma.sync", MMA)}
NARROWEST_WGMMA = 64  # rows; tiles with fewer use mma.sync on every generation
# In PTX, what would decide codes otherwise than the oracle. (On sm_80 the sum of two bf16 is an fma of bf16, by one: it
# rounds once, as the sum in float32 rounded to bf16 does.)
INEXACT = re.compile(r"\bfma\.\S*f(?:32|64)\w*|\bdiv\.full\S*|\bdiv\.approx\S*|\brcp\.approx\S*")
LOCAL_MEMORY = re.compile(r"\b(?:STL|LDL)\b")


@dataclass(frozen=True)
class Row:
    """What one compiled form turned out as; ``problem`` is a sentence, or None when everything holds."""

    kernel: str
    form: str
    capability: int
    instruction: str = ""
    registers: int = 0
    spills: int = 0  # instructions that touch local memory
    shared: int = 0  # bytes
    pruned: bool = False
    problem: str | None = None

    def cells(self) -> list[str]:
        """The row of the table."""
        verdict = "FAIL" if self.problem else "pruned" if self.pruned else "ok"
        measured = [""] * 4
        if self.registers:
            measured = [self.instruction, str(self.registers), str(self.spills), f"{self.shared / KIB:.1f}"]
        return [self.kernel.removesuffix("_kernel"), self.form, f"sm_{self.capability}", *measured, verdict]


HEADER = ("kernel", "form", "GPU", "instruction", "registers", "spills", "shared KiB", "")


def all_specialisations() -> Iterator[tuple[str, int, Specialisation]]:
    """Every form of every kernel, with the module and the index where a worker finds it."""
    for module in MODULES:
        forms = importlib.import_module(f"bitnet_train.kernels.triton.{module}").SPECIALISATIONS
        for index, form in enumerate(forms):
            yield module, index, form


def describe(form: Specialisation) -> str:
    """Types of the pointers, compile-time numbers, warps and stages, on one line."""
    pointers = [kind.removesuffix(":16").removeprefix("*") for kind in form.signature.values() if kind.startswith("*")]
    types = "/".join(dict.fromkeys(pointers))
    launched = f"{form.num_warps} warps, {form.num_stages} stages"
    if isinstance(form, TiledSpecialisation):
        tile = form.tile
        way = "TMA" if form.constants["TMA"] else "pointers"
        flat = ", flattened" if tile.flatten else ""
        return f"{types} {tile.rows}x{tile.columns}x{tile.depth}, {launched}, {way}{flat}"
    numbers = " ".join(f"{name}={value}" for name, value in form.constants.items() if isinstance(value, (int, float)))
    return f"{types} {numbers}, {launched}"


def instruction_used(form: Specialisation, capability: int, ptx: str) -> tuple[str, str | None]:
    """The name of the tensor-core instruction in the PTX, and what is wrong with it, if anything."""
    if form.instruction is None:
        return "", None
    newest, patterns = NEWEST[capability // 10]
    if re.search(patterns[form.instruction], ptx):
        return f"{newest} {form.instruction}", None
    narrow = isinstance(form, TiledSpecialisation) and min(form.tile.rows, form.tile.columns) < NARROWEST_WGMMA
    # Triton before 3.9 has no integer tcgen05; mma.sync runs on Blackwell too, slower.
    accepted = narrow or (newest == "tcgen05" and form.instruction == "int8")
    if re.search(MMA[form.instruction], ptx):
        return f"mma.sync {form.instruction}", None if accepted else f"uses mma.sync instead of {newest}"
    return "", f"has no {form.instruction} tensor-core instruction"


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and how many instructions touch local memory (spilled registers), of compiled code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def inspect(option: str) -> str:
            return subprocess.run(
                [str(TOOLS / "cuobjdump"), option, file.name], capture_output=True, text=True, check=True
            ).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", inspect("-res-usage"))
        if usage is None:
            raise RuntimeError("cuobjdump reports no resource usage")
        # A stack frame is not yet a spill; disassembling takes longer than compiling some kernels.
        spills = len(LOCAL_MEMORY.findall(inspect("-sass"))) if int(usage[2]) else 0
    return int(usage[1]), spills


def check(form: Specialisation, capability: int) -> Row:
    """Compiles one form for one generation and looks at what came out."""
    from triton.backends.compiler import GPUTarget

    kernel, described = form.kernel.__name__, describe(form)
    if isinstance(form, TiledSpecialisation) and form.pruned(capability):
        return Row(kernel, described, capability, pruned=True)
    try:
        compiled = triton.compile(form.source(), target=GPUTarget("cuda", capability, 32), options=form.options())
    except Exception as error:  # whatever the compiler raises is one row's result, not the end of the check
        reason = (str(error).strip() or repr(error)).splitlines()[-1]  # the lines before are the kernel's source
        return Row(kernel, described, capability, problem=f"does not compile: {reason}")
    ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
    registers, spills = resources(compiled.asm["cubin"])
    instruction, wrong = instruction_used(form, capability, ptx)
    problems = [wrong] if wrong else []
    if spills:
        problems.append(f"spills registers ({spills} instructions)")
    if shared > shared_memory_limit(capability):
        problems.append(f"needs {shared} bytes of shared memory of {shared_memory_limit(capability)}")
    inexact = sorted(set(INEXACT.findall(ptx))) if form.quantiser else []
    if inexact:
        problems.append(f"decides codes with {', '.join(inexact)}")
    return Row(
        kernel, described, capability, instruction, registers, spills, shared, problem="; ".join(problems) or None
    )


def _check_at(module: str, index: int, capability: int) -> Row:
    """:func:`check` in a worker: compiled kernels cannot be sent between processes, their place can."""
    form = importlib.import_module(f"bitnet_train.kernels.triton.{module}").SPECIALISATIONS[index]
    return check(form, capability)


def plan(quick: bool) -> list[tuple[str, int, int]]:
    """What to compile: (module, index, capability). Quick: one form of every kernel and instruction, on two GPUs."""
    tasks = []
    for capability in QUICK_ARCHITECTURES if quick else ARCHITECTURES:
        forms = [entry for entry in all_specialisations() if capability >= entry[2].minimum]
        if quick:
            # Of a kernel's tiles those come first that are meant to be fastest.
            chosen: dict[tuple[str, str | None, bool], tuple[str, int, Specialisation]] = {}
            for entry in forms:
                form = entry[2]
                if not (isinstance(form, TiledSpecialisation) and form.pruned(capability)):
                    chosen.setdefault((form.kernel.__name__, form.instruction, bool(form.constants.get("TMA"))), entry)
            forms = list(chosen.values())
        tasks += [(module, index, capability) for module, index, _ in forms]
    return tasks


def run(tasks: list[tuple[str, int, int]], jobs: int, console: Console) -> list[Row]:
    """The rows of ``tasks`` in their order, compiled in ``jobs`` processes."""
    rows: dict[int, Row] = {}
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("compiling", total=len(tasks))
        with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
            waiting = {pool.submit(_check_at, *task): position for position, task in enumerate(tasks)}
            for done in as_completed(waiting):
                rows[waiting[done]] = done.result()
                progress.advance(bar)
    return [rows[position] for position in range(len(tasks))]


def markdown(rows: Iterable[Row]) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    return "\n".join([*lines, *("| " + " | ".join(row.cells()) + " |" for row in rows)]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bitnet_train.kernels.triton.ahead_of_time",
        description="Compile every Triton kernel for every GPU generation, without a GPU, and check the result.",
    )
    parser.add_argument("--quick", action="store_true", help="one form of every kernel, for sm_80 and sm_90")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table to FILE as well")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: Triton interprets kernels instead of compiling them. Unset it.")
        return 2
    rows = run(plan(options.quick), max(1, options.jobs), Console(stderr=True))
    table = Table(*HEADER)
    for row in rows:
        table.add_row(*row.cells(), style="red" if row.problem else "dim" if row.pruned else None)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    failures = [row for row in rows if row.problem]
    for row in failures:
        console.print(f"sm_{row.capability} {row.kernel} ({row.form}): {row.problem}.", highlight=False, soft_wrap=True)
    pruned = sum(row.pruned for row in rows)
    console.print(f"{len(rows) - pruned} compiled, {pruned} pruned, {len(failures)} failed.", highlight=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
