"""Compile a kernel of polyzoo.attention for a GPU that need not be there, and read the result."""

from __future__ import annotations

import re
import subprocess
import tempfile
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
OPTIONAL = {
    "Bias", "Mask", "RelH", "RelW", "DRelH", "DRelW", "Index", "Counts", "KvLens", "CuQ", "CuK",
    "Schedule", "Rng", "Grid",
}  # fmt: skip
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
    """Disassemble a cubin of one kernel with the cuobjdump of triton's wheel."""
    (found,) = read_functions(cubin).values()
    return Compiled(found.registers, found.spilled, shared, found.instructions)


def read_functions(cubin: bytes) -> dict[str, Compiled]:
    """Every kernel of a cubin by name; shared memory is left 0."""
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
    found: dict[str, Compiled] = {}
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", code, re.DOTALL))
    for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):
        names = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", bodies[name], re.MULTILINE
        )
        found[name] = Compiled(int(registers), int(stack), 0, Counter(names))
    assert found, usage
    return found


def compile_case(key: str, sizes: tuple[int, int, int, int, bool], *, capability: int) -> Compiled:
    """Compile the kernel of a key of `tuning.case_key`, for training, with those tile sizes."""
    from polyzoo.attention.kernels import triton_backward_kv, triton_backward_q, triton_forward
    from polyzoo.attention.kernels.tiles import head_blocks

    kind, head, rules, queries, _ = key.split("|")
    block_m, block_n, warps, stages, tma = sizes
    d = int(head)
    first, second = head_blocks(d)
    grid = int(rules.removeprefix("grid")) if rules.startswith("grid") else 0
    lens, causal, window = (rules == rule for rule in ("lens", "causal", "window"))
    by_product = kind == "forward" and grid == 16
    block_n = block_n if by_product else max(block_n, grid)
    constants = {
        "GROUP": 1, "ALIGN": 8, "D": d, "D0": first, "D1": second, "DV": d, "DV0": first,
        "DV1": second, "BM": block_m, "BN": block_n, "HAS_LEFT": window,
        "HAS_RIGHT": causal or window, "KVLENS": lens, "PACKED": False, "HAS_MASK": False,
        "HAS_BIAS": False, "NATURAL": False, "KW": 14 if grid == 16 else grid, "KWP": grid or 1,
        "KG": 0, "GRID_WIDTH": 14,
        "DROPOUT": False, "EDGES": bool(rules) or int(queries) < 1024, "RAW": not grid,
        "TMA": tma, "LOW": True, "CAREFUL": True, "PRECISION": "ieee",
    }  # fmt: skip
    present = {"KvLens"} if lens else set()
    if by_product:
        constants |= {"KW": 0, "KWP": 1, "KG": 32, "RAW": True}
        present |= {"Grid"}
    if grid:
        present |= {"RelH", "RelW", "DRelH", "DRelW"}
    widths = {"KD0": first, "KD1": second, "VD0": first, "VD1": second}
    return compile_kernel(
        {
            "forward": triton_forward.forward_kernel,
            "backward_kv": triton_backward_kv.backward_kv_kernel,
            "backward_q": triton_backward_q.backward_q_kernel,
        }[kind],
        constants,
        capability=capability,
        warps=warps,
        stages=stages,
        absent=OPTIONAL - present,
        descriptors={n: [1, 1, block_n, w] for n, w in widths.items() if w} if tma else None,
    )
