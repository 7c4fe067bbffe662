"""The packages as distributions: versions, wheels, declared dependencies, and quiet imports."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support.cli import child_environment, run_python
from support.workspace import PACKAGES, ROOT, project

IDS = [package.name for package in PACKAGES]


def portion(package: Path) -> Path:
    """The one folder that a package adds to the namespace."""
    (folder,) = (path for path in (package / "src" / "polyzoo").iterdir() if path.is_dir())
    return folder


def modules(package: Path) -> list[str]:
    source = package / "src"
    files = sorted(portion(package).rglob("*.py"))
    dotted = [".".join(file.relative_to(source).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in dotted if not name.endswith("__main__")]


def test_one_version_and_siblings_pinned_to_it() -> None:
    (version,) = {project(package)["version"] for package in PACKAGES}
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert root["version"] == version
    for package in PACKAGES:
        about = project(package)
        assert about["name"] == f"polyzoo-{package.name.replace('_', '-')}"
        extras = [
            line for extra in about.get("optional-dependencies", {}).values() for line in extra
        ]
        for line in (*about["dependencies"], *extras):
            requirement = Requirement(line)
            if requirement.name.startswith("polyzoo-"):
                assert str(requirement.specifier) == f"=={version}", line
            else:
                assert "==" not in line, f"{line}: a library must not pin others"


def test_the_workspace_knows_every_package() -> None:
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = (ROOT / "requirements.txt").read_text()
    for package in PACKAGES:
        assert re.search(rf"^-e packages/{package.name}\b", wanted, re.M)
        assert f"packages/{package.name}/src" in root["tool"]["basedpyright"]["extraPaths"]
        assert f"polyzoo.{package.name}" in root["tool"]["importlinter"]["root_packages"]


def test_the_tested_versions_satisfy_every_requirement() -> None:
    lines = (ROOT / "constraints" / "tested.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for package in PACKAGES:
        about = project(package)
        extras = about.get("optional-dependencies", {}).values()
        for line in (*about["dependencies"], *(line for extra in extras for line in extra)):
            requirement = Requirement(line)
            if not requirement.name.startswith("polyzoo-"):
                assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_the_namespace_stays_open() -> None:
    for package in PACKAGES:
        assert not (package / "src" / "polyzoo" / "__init__.py").exists()
        assert (portion(package) / "py.typed").exists(), (
            f"{package.name}: users' mypy would see Any"
        )
        assert (portion(package) / "__init__.py").exists()
    assert not (ROOT / "polyzoo").exists()
    assert not [
        folder for package in PACKAGES for folder in (ROOT / package.name,) if folder.exists()
    ]


def declared(package: Path) -> set[str]:
    """Distributions that come with a package, itself and everything they require included."""
    todo: list[Requirement] = [Requirement(line) for line in project(package)["dependencies"]]
    found: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in found:
            continue
        found.add(key)
        sibling = next((p for p in PACKAGES if project(p)["name"] == key[0]), None)
        if sibling is not None:
            todo += [Requirement(line) for line in project(sibling)["dependencies"]]
            continue
        try:
            lines = distribution(requirement.name).requires or []
        except PackageNotFoundError:
            continue
        for line in map(Requirement, lines):
            extras = ("", *requirement.extras)
            if line.marker is None or any(line.marker.evaluate({"extra": e}) for e in extras):
                todo.append(line)
    return {name for name, _ in found}


HIDE = """
import importlib, importlib.machinery, json, sys
hidden, names = json.loads(sys.argv[1])
hidden = set(hidden)
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)
sys.meta_path = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
failed = {}
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {error}"
print(json.dumps(failed))
"""


@pytest.mark.parametrize("package", PACKAGES, ids=IDS)
def test_importing_needs_only_what_is_declared(package: Path) -> None:
    allowed = declared(package)
    hidden = [
        top
        for top, names in packages_distributions().items()
        if top != "polyzoo" and not allowed & {canonicalize_name(name) for name in names}
    ]
    assert "pytest" in hidden
    done = run_python(HIDE, json.dumps([hidden, modules(package)]), timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


QUIET = """
import importlib, json, logging, os, random, signal, sys, warnings
others, ours = json.loads(sys.argv[1])
for name in others:
    try:
        module, _, attribute = name.partition(":")
        getattr(importlib.import_module(module), attribute or "__name__", None)
    except ImportError:
        pass
import numpy, torch
def state():
    return {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cudnn.allow_tf32,
        "default dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch seed": torch.get_rng_state().tolist(),
        "python seed": repr(random.getstate()),
        "numpy seed": repr(numpy.random.get_state()),
        "signals": [repr(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)],
        "path": list(sys.path),
        "handlers": repr(logging.getLogger().handlers),
        "filters": repr(warnings.filters),
    }
before, events = state(), []
def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event in ("os.mkdir", "os.putenv", "socket.connect", "socket.getaddrinfo",
                           "subprocess.Popen", "os.rename", "os.remove", "os.fork"):
        events.append([event, repr(arguments)])
sys.addaudithook(watch)
for name in ours:
    importlib.import_module(name)
after = state()
print(json.dumps([events, [key for key in before if before[key] != after[key]]]))
"""


def imported_by(package: Path) -> Iterator[str]:
    """Third-party modules, and "module:name", that a package's files import, at any depth.

    The names too, since some packages (diffusers) load what lies behind a name at its first use.
    """
    for file in portion(package).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield from (f"{node.module}:{alias.name}" for alias in node.names)


def test_importing_has_no_side_effects() -> None:
    """Neither files, network, processes, environment, threads, seeds nor global switches."""
    ours = [name for package in PACKAGES for name in modules(package)]
    others = {name for package in PACKAGES for name in imported_by(package)}
    foreign = sorted(
        name
        for name in others
        if name.partition(":")[0].partition(".")[0]
        not in {"polyzoo", "__future__", *sys.stdlib_module_names}
    )
    quiet = {"PYTHONDONTWRITEBYTECODE": "1"}
    done = run_python(QUIET, json.dumps([foreign, ours]), env=quiet, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], []]


def build(package: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target)]
    return subprocess.run([*command, str(package)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of every package."""
    target = tmp_path_factory.mktemp("wheels")
    for package in PACKAGES:
        done = build(package, target)
        assert done.returncode == 0, done.stdout + done.stderr
    return {
        package.name: next(target.glob(f"polyzoo_{package.name}-*-py3-none-any.whl"))
        for package in PACKAGES
    }


@pytest.mark.parametrize("package", PACKAGES, ids=IDS)
def test_a_wheel_holds_its_portion_and_nothing_else(package: Path, wheels: dict[str, Path]) -> None:
    about = project(package)
    info = f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    with zipfile.ZipFile(wheels[package.name]) as wheel:
        names = set(wheel.namelist())
        points = wheel.read(f"{info}/entry_points.txt").decode()
    source = package / "src"
    tracked = {
        str(path.relative_to(source))
        for path in portion(package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if not name.startswith(f"{info}/")} == tracked
    for name, target in about["entry-points"]["polyzoo.commands"].items():
        assert f"{name} = {target}" in points


def test_the_root_is_not_installable(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(ROOT / "pyproject.toml", root)
    done = build(root, tmp_path)
    assert done.returncode != 0
    assert "Unable to determine which files to ship" in done.stdout + done.stderr


@pytest.mark.slow
def test_wheels_install_beside_each_other_and_run(wheels: dict[str, Path], tmp_path: Path) -> None:
    """Installed from wheels alone, without a network; what they stand on comes from this Python."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    here = next(Path(p) for p in sys.path if p.endswith("site-packages"))
    (site / "what_they_stand_on.pth").write_text(f"{here}\n")
    python = folder / "bin" / "python"
    install = ["install", "--quiet", "--no-deps", "--no-index", *map(str, wheels.values())]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [*map(str, command)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    names = [name for package in PACKAGES for name in modules(package)]
    where = (
        "import importlib, sys\nfor n in sys.argv[1:]: print(importlib.import_module(n).__file__)"
    )
    files = run(python, "-c", where, *names).splitlines()
    assert all(file.startswith(str(site)) for file in files[-len(names) :])
    listed = run(folder / "bin" / "polyzoo", "--help")
    assert "not usable" not in listed
    for package in PACKAGES:
        for group in project(package)["entry-points"]["polyzoo.commands"]:
            assert f"  {group} " in listed
    assert run(folder / "bin" / "polyzoo", "--version").startswith("polyzoo 0.")


def lint_imports(config: Path, sources: list[Path]) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("lint-imports")
    return subprocess.run(
        [str(script), "--no-cache", "--config", str(config)],
        env={**child_environment(), "PYTHONPATH": os.pathsep.join(map(str, sources))},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_layers_hold() -> None:
    done = lint_imports(ROOT / "pyproject.toml", [package / "src" for package in PACKAGES])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("core/src/polyzoo/core/errors.py", "import polyzoo.sea.config"),
        ("core/src/polyzoo/core/errors.py", "import polyzoo.attention"),
        ("attention/src/polyzoo/attention/__init__.py", "import polyzoo.training"),
        ("sea/src/polyzoo/sea/splitting.py", "import polyzoo.training"),
    ],
)
def test_the_layers_are_watched(tmp_path: Path, file: str, line: str) -> None:
    """The contract is not empty: each forbidden import, added to a copy, is found."""
    copy = tmp_path / "packages"
    shutil.copytree(ROOT / "packages", copy, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copytree(
        ROOT / "packages/core/src/polyzoo/core/assets", copy / "core/src/polyzoo/core/assets"
    )
    with (copy / file).open("a") as opened:
        opened.write(f"\n{line}\n")
    done = lint_imports(ROOT / "pyproject.toml", [copy / p.name / "src" for p in PACKAGES])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
