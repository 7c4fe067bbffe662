"""Compile a kernel of polyzoo.attention for a GPU that need not be there, and read what came out."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

FLOATS = {"scale", "keep_scale", "true_scale"}
STATISTICS = {"Lse", "Delta", "Part", "PartLse"}
INTEGERS = {"KvLens": "*i32", "CuQ": "*i32", "CuK": "*i32", "Schedule": "*i32", "Rng": "*i64"}
LISTS = {"Index": "*i32", "Counts": "*i32", "Mask": "*u8"}


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a kernel."""

    registers: int
    spilled: int
    """Bytes of local memory a thread."""
    shared: int
    """Bytes of shared memory a program."""
    instructions: Counter[str]

    @property
    def matrix_products(self) -> int:
        """Tensor-core instructions."""
        return sum(self.instructions[name] for name in ("HMMA", "HGMMA", "IMMA", "QGMMA"))


def compile_kernel(
    kernel,
    constants: dict[str, object],
    *,
    capability: int,
    warps: int,
    stages: int,
    absent: set[str],
    element: str = "bf16",
    descriptors: dict[str, list[int]] | None = None,
) -> Compiled:
    """Compile with 16-byte aligned pointers; arguments in `absent` are None."""
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[name] = "constexpr", constants[name]
        elif name in FLOATS:
            signature[name] = "fp32"
        elif descriptors and name in descriptors:
            block = ",".join(str(size) for size in descriptors[name])
            signature[name] = f"tensordesc<{element}[{block}]>"
        elif name in absent or name in ("KD0", "KD1", "VD0", "VD1"):
            signature[name], constexprs[name] = "constexpr", None
        elif name in STATISTICS:
            signature[name] = "*fp32"
        elif name in INTEGERS | LISTS:
            signature[name] = (INTEGERS | LISTS)[name]
        elif name[0].isupper():
            signature[name] = f"*{element}"
        else:
            signature[name] = "i32"
        if signature[name].startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    return read(made.asm["cubin"], made.metadata.shared)


def read(cubin: bytes, shared: int) -> Compiled:
    """Disassemble with the cuobjdump of triton's wheel."""
    import tempfile

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run(
                [tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    names = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", code, re.M))
    return Compiled(int(found[1]), int(found[2]), shared, names)
