"""One compiled form of a kernel, as plain data: what the ahead-of-time check compiles without a GPU."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Specialisation:
    """A kernel with the types of its arguments and its compile-time constants.

    Every argument is named once: those of run time in ``signature``, constexprs and absent (None) pointers in
    ``constants``.
    """

    kernel: Any  # what @triton.jit returned (autotuned kernels: their .fn)
    # Argument -> Triton type: "*fp32", "*bf16", "*i8", "*fp8e4nv", "i32", "fp32", ... A type that ends in ":16" is a
    # pointer or an integer divisible by 16, which is what lets the compiler vectorise as it does at run time.
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    num_stages: int
    instruction: str | None = None  # "int8", "fp8", "bf16": tensor-core instruction family expected
    # Decides codes: no fma.rn.f32 and no div.full in its PTX. (fma.rn.bf16x2 is what sm_80 and 86 have for adding two
    # bf16 numbers, rounded once like the float32 sum and its cast, so it is allowed.)
    quantiser: bool = False
    minimum: int = 80  # the first compute capability that has what the kernel needs, as 10 * major + minor

    def source(self) -> Any:
        """The ``triton.compiler.ASTSource`` to compile. Needs Triton imported without TRITON_INTERPRET."""
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        types = {name: self.signature.get(name, "constexpr") for name in names}
        missing = [name for name in names if name not in self.signature and name not in self.constants]
        if missing or not names_only(names, self.signature, self.constants):
            raise ValueError(f"{self.kernel.__name__}: signature and constants do not fit its arguments ({missing})")
        aligned = [(i,) for i, name in enumerate(names) if types[name].endswith(":16")]
        return ASTSource(
            self.kernel,
            {name: type_.removesuffix(":16") for name, type_ in types.items()},
            dict(self.constants),
            {index: [["tt.divisibility", 16]] for index in aligned},
        )

    def options(self) -> dict[str, object]:
        """The compile options a launch uses (``triton.compile(..., options=...)``)."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


def names_only(names: list[str], *named: dict[str, Any]) -> bool:
    """Whether every key of ``named`` is an argument and none is named twice."""
    keys = [key for part in named for key in part]
    return len(keys) == len(set(keys)) and set(keys) <= set(names)
