"""Small packages of every kind that a corpus can be mined from."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path


def metadata(name: str, *, version: str = "1.0", licence: str = "MIT") -> str:
    return (
        f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nLicense-Expression: {licence}\n"
    )


def function(name: str, documentation: str | None, *, tag: str = "", lines: int = 3) -> str:
    """A Python function whose code no other call of this gives."""
    doc = f'    """{documentation}"""\n' if documentation else ""
    body = "".join(f"    {name}_{tag}value_{index} = {index}\n" for index in range(lines))
    return f"def {name}(first):\n{doc}{body}    return {name}_{tag}value_0\n"


def wheel(
    folder: Path, name: str, files: Mapping[str, str | bytes], *, licence: str = "MIT"
) -> Path:
    """A wheel with some files."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, content in files.items():
            archive.writestr(inner, content)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", metadata(name, licence=licence))
    return path


def sdist(folder: Path, name: str, files: Mapping[str, str]) -> Path:
    """A source distribution with some files, and a link that unpacking must not follow."""
    path = folder / f"{name}-2.0.tar.gz"
    entries = {f"{name}-2.0/{inner}": content for inner, content in files.items()}
    entries[f"{name}-2.0/PKG-INFO"] = metadata(name, version="2.0")
    with tarfile.open(path, "w:gz") as archive:
        for inner, content in entries.items():
            data = content.encode()
            info = tarfile.TarInfo(inner)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo(f"{name}-2.0/docs")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc"
        archive.addfile(link)
    return path


def tree(folder: Path, files: Mapping[str, str]) -> Path:
    """An unpacked folder with some files."""
    for inner, content in files.items():
        path = folder / inner
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


SIX_LANGUAGES = {
    "lib/shape.py": "def area(side):\n"
    '    """Compute the area of a square.\n\n    More SECRET words.\n    """\n'
    "    result = side * side\n    return result\n",
    "lib/Shape.java": "class Shape {\n  /**\n   * Computes the area of a square.\n"
    "   * @param side SECRET\n   */\n"
    "  public int area(int side) {\n    int result = side * side;\n    return result;\n  }\n}\n",
    "lib/shape.js": "/**\n * Work out the area of a square.\n * @param {number} side SECRET\n */\n"
    "function area(side) {\n  const result = side * side;\n  return result;\n}\n",
    "lib/shape.go": "package lib\n\n// Area gives the area of a square.\n//\n// SECRET.\n"
    "func Area(side int) int {\n\tresult := side * side\n\treturn result\n}\n",
    "lib/Shape.php": "<?php\nclass Shape {\n  /**\n   * Find the area of a square.\n   *\n"
    "   * SECRET\n   */\n"
    "  public function area($side) {\n    $result = $side * $side;\n    return $result;\n  }\n}\n",
    "lib/shape.rb": "class Shape\n  # Return the area of one square.\n  #\n  # SECRET\n"
    "  def area(side)\n    result = side * side\n    result\n  end\nend\n",
}


def npm(folder: Path, name: str, files: Mapping[str, str], *, licence: str = "ISC") -> Path:
    """An unpacked npm package."""
    about = {"name": name, "version": "3.1.0", "license": licence}
    return tree(folder, {**files, "package.json": json.dumps(about)})
