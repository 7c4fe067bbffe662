"""The README's examples run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "packages" / "attention" / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:50])
def test_example(block: str, capsys: pytest.CaptureFixture[str]):
    if "torchrun" in block.splitlines()[0]:
        compile(block, str(README), "exec")
        pytest.skip("needs the processes that torchrun starts: test_tiling_allreduce.py has them")
    for library in ("transformers", "diffusers", "segment_anything"):
        if f"from {library}" in block:
            pytest.importorskip(library)
    exec(compile(block, str(README), "exec"), {})
    assert capsys.readouterr().err == ""
