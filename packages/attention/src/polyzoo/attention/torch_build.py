"""Whether torch itself was built for a GPU: without its kernels no backend can run there."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ARCH = re.compile(r"(sm|compute)_(\d+)(\d)[a-z]?")


def build_problem(capability: tuple[int, int], archs: Sequence[str]) -> str | None:
    """Say that this torch has no code for a GPU, and the fix; None where it has.

    Machine code runs on GPUs of its major version from its minor on; PTX on all later ones.

    Args:
        capability: Of the GPU.
        archs: What torch was built for, as `torch.cuda.get_arch_list()` tells; empty is unknown.
    """
    for arch in archs:
        found = _ARCH.fullmatch(arch)
        if found is None:
            continue
        kind, have = found[1], (int(found[2]), int(found[3]))
        if kind == "compute" and have <= capability:
            return None
        if kind == "sm" and have[0] == capability[0] and have[1] <= capability[1]:
            return None
    if not archs:
        return None
    name = f"sm_{capability[0]}{capability[1]}"
    fix = "install torch from its cu126 index" if capability < (7, 5) else "install a newer torch"
    return f"this torch was built for {' '.join(archs)}, not for {name}: {fix}"
