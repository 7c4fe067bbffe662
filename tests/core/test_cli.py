"""The `polyzoo` command as people meet it: a process, its exit status, stdout and stderr."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from polyzoo.core.cli import Command
from support.cli import child_environment, run_cli, run_python
from support.workspace import PACKAGES, project

SAMPLE = '''
"""A package with commands of every kind."""
import os, signal, sys, time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
import tyro
from polyzoo.core.cli import Command, CommandGroup

@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    """How the weights move."""
    lr: float = 1e-3
    """How far a step goes."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Memory of the two moments."""

@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """Low-rank adapters."""
    rank: int = 8
    """Their rank."""

@dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """What to train."""
    data: Path
    """Where the records are."""
    steps: int = 100
    """How many steps to take."""
    kind: Literal["small", "large"] = "small"
    """Which model."""
    optim: Optim = field(default_factory=Optim)
    """The optimizer."""
    lora: Lora | None = None
    """Adapters, where only they are trained."""
    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")

@dataclass(frozen=True, kw_only=True, slots=True)
class Show:
    """What to show."""
    what: tyro.conf.Positional[str] = "fine"
    """Name of a thing."""

def tiny():
    """A minute on a laptop."""
    return Train(data=Path("tiny"), steps=5, optim=Optim(lr=0.5))

GROUP = CommandGroup(summary="Things to try", commands={
    "train": Command(summary="Train a thing", config=Train, run="sample_run:train",
                     presets={"tiny": tiny}),
    "show": Command(summary="Show a thing", config=Show, run="sample_run:show",
                    render="sample_run:render"),
    "lost": Command(summary="Needs what is not there", config=Show, run="sample_lost:show"),
})
'''
RUN = """
import logging, os, signal, sys, time
from dataclasses import dataclass
from polyzoo.core.errors import ConfigError, Interrupted, LockedError
from polyzoo.core.log import get_logger, progress

@dataclass
class Shown:
    what: str
    share: float
    exit_code: int = 0

def train(config):
    return {"data": config.data, "steps": config.steps, "lr": config.optim.lr,
            "rank": config.lora and config.lora.rank}

def show(config):
    print("a library talks")
    get_logger("polyzoo.sample").info("a note")
    for _ in progress(range(3), description="Working"):
        pass
    match config.what:
        case "config": raise ConfigError("x: bad")
        case "interrupted": raise Interrupted("stopped at step 3; run again to resume")
        case "ctrl-c": os.kill(os.getpid(), signal.SIGINT); time.sleep(5)
        case "oserror": open("/no/such/file")
        case "bug": raise AssertionError("ours")
        case "nothing": return None
        case "partly": return Shown("partly", 0.5, exit_code=1)
    return Shown(config.what, float("nan"))

def render(result):
    return f"** {result.what} **"
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package that offers commands, and two that are broken."""
    folder = tmp_path_factory.mktemp("sample")
    (folder / "sample_cli.py").write_text(SAMPLE)
    (folder / "sample_run.py").write_text(RUN)
    (folder / "sample_lost.py").write_text("import no_such_package\n")
    (folder / "broken_cli.py").write_text("raise RuntimeError('it is broken')\n")
    info = folder / "sample-3.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sample\nVersion: 3.2\n")
    (info / "entry_points.txt").write_text(
        "[polyzoo.commands]\nsample = sample_cli:GROUP\nbroken = broken_cli:GROUP\n"
        "gone = gone_cli:GROUP\n"
    )
    return folder


def test_root_help_lists_the_groups_though_some_are_broken(sample: Path) -> None:
    done = run_cli("--help", path=sample)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "  sample  " in done.stdout
    assert "Things to try" in done.stdout
    assert "(not usable: RuntimeError: it is broken)" in done.stdout
    assert "(not usable: ModuleNotFoundError: No module named 'gone_cli')" in done.stdout
    assert "assets" in done.stdout
    assert run_cli(path=sample).stdout == done.stdout, "no arguments: the same page"
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_group_help_and_command_help(sample: Path) -> None:
    group = run_cli("sample", "--help", path=sample)
    assert group.returncode == 0
    assert "polyzoo sample  Things to try" in group.stdout
    assert "  train  Train a thing" in group.stdout
    command = run_cli("sample", "train", "--help", path=sample)
    assert command.returncode == 0
    for part in (
        "usage: polyzoo sample train [PRESET]",
        "Train a thing.",
        "tiny: A minute on a laptop.",
        "--data PATH",
        "Where the records are. (required)",
        "--optim.lr FLOAT",
        "--lora.rank INT",
        "--config FILE",
        "--json",
        "--quiet",
    ):
        assert part in command.stdout


def test_preset_then_file_then_flags(sample: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 7\noptim:\n  betas: [0.5, 0.6]\n")

    def train(*arguments: str) -> dict[str, object]:
        done = run_cli("sample", "train", *arguments, "--json", path=sample)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    base = {"data": "tiny", "steps": 5, "lr": 0.5, "rank": None}
    assert train("tiny") == base
    assert train("tiny", "--config", str(file)) == {**base, "steps": 7}
    assert train("tiny", "--steps", "9", f"--config={file}") == {**base, "steps": 9}
    assert train("--data", "d", "--config", str(file)) == {
        "data": "d",
        "steps": 7,
        "lr": 0.001,
        "rank": None,
    }
    assert train("tiny", "--lora.rank", "3") == {**base, "rank": 3}
    file.write_text("data: from-file\nlora: {rank: 2}\n")
    assert train("--config", str(file)) == {**base, "data": "from-file", "steps": 100} | {
        "lr": 0.001,
        "rank": 2,
    }


WRONG = [
    (["nope"], r"no group 'nope'"),
    (["sampel"], r"did you mean sample?"),
    (["sample"], "name a command: train, show, lost"),
    (["sample", "trian"], "no command 'trian'; did you mean train?"),
    (["sample", "train"], "Missing: --data PATH"),
    (["sample", "train", "tinny"], "no preset 'tinny'; did you mean tiny?"),
    (["sample", "train", "tiny", "--stepps", "1"], "--stepps"),
    (["sample", "train", "tiny", "--steps", "x"], "--steps"),
    (["sample", "train", "tiny", "--steps", "0"], "steps=0 must be at least 1"),
    (["sample", "train", "tiny", "--kind", "huge"], "invalid choice 'huge'"),
    (["sample", "train", "tiny", "--optim.lrr", "1"], "--optim.lr"),
    (["sample", "train", "tiny", "extra"], "extra"),
    (["sample", "train", "--config"], "--config"),
    (["--nope"], "no group '--nope'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_usage_is_one_clear_line(sample: Path, arguments: list[str], message: str) -> None:
    done = run_cli(*arguments, path=sample)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("polyzoo: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not set("│╭╰─") & set(done.stderr)
    as_json = run_cli(*arguments, "--json", path=sample)
    assert as_json.stdout == ""
    error = json.loads(as_json.stderr)["error"]
    assert error["exit_code"] == as_json.returncode == 2
    assert error["type"] == "UsageError"


def test_a_bad_config_file_is_explained(sample: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text('{"optim": {"lrr": 1}}')
    done = run_cli("sample", "train", "tiny", "--config", file, path=sample)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("optim.lrr: unknown field; did you mean 'lr'?\n")
    assert str(file) in done.stderr


def test_results_are_rendered_or_json(sample: Path) -> None:
    done = run_cli("sample", "show", "this", path=sample)
    assert done.returncode == 0
    assert done.stdout == "a library talks\n** this **\n"
    assert "a note\n" in done.stderr
    assert "Working: 3/3" in done.stderr
    done = run_cli("sample", "show", "this", "--json", "--quiet", path=sample)
    assert json.loads(done.stdout) == {"what": "this", "share": None, "exit_code": 0}
    assert done.stdout.count("\n") == 1
    assert done.stderr == "a library talks\n"
    plain = run_cli("sample", "train", "tiny", path=sample)
    assert plain.stdout == "data:  tiny\nsteps: 5\nlr:    0.5\nrank:  null\n"
    partly = run_cli("sample", "show", "partly", path=sample)
    assert (partly.returncode, partly.stdout[-13:]) == (1, "** partly **\n")
    assert run_cli("sample", "show", "nothing", path=sample).stdout == "a library talks\n"


@pytest.mark.parametrize(
    ("what", "status", "message"),
    [
        ("config", 1, "x: bad"),
        ("interrupted", 75, "stopped at step 3; run again to resume"),
        ("ctrl-c", 130, "interrupted"),
        ("oserror", 1, "/no/such/file: No such file or directory"),
    ],
)
def test_errors_have_one_line_and_a_status(
    sample: Path, what: str, status: int, message: str
) -> None:
    done = run_cli("sample", "show", what, "--quiet", path=sample)
    assert done.returncode == status
    assert done.stderr == f"polyzoo: error: {message}\n"
    done = run_cli("sample", "show", what, "--quiet", "--json", path=sample)
    assert (done.returncode, done.stdout) == (status, "")
    error = json.loads(done.stderr.splitlines()[-1])["error"]
    assert (error["message"], error["exit_code"]) == (message, status)


def test_a_bug_shows_where_it_is(sample: Path) -> None:
    done = run_cli("sample", "show", "bug", path=sample)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_broken_packages_are_named(sample: Path) -> None:
    done = run_cli("broken", "--help", path=sample)
    assert done.returncode == 1
    assert "polyzoo broken is not usable: broken_cli:GROUP cannot be loaded" in done.stderr
    done = run_cli("sample", "lost", path=sample)
    assert done.returncode == 1
    assert "sample_lost needs no_such_package, which is not installed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_error(sample: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "polyzoo.core", "--help"],
        env=child_environment(sample),
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_version_names_the_parts(sample: Path) -> None:
    done = run_cli("--version", path=sample)
    own = project(PACKAGES[0])["version"]
    assert done.stdout.startswith(f"polyzoo {own} (")
    assert f"torch {version('torch')}" in done.stdout
    assert "sample 3.2" in done.stdout


def every_help() -> list[tuple[str, ...]]:
    """All help pages of the packages in this repository."""
    code = (
        "from polyzoo.core.cli import _entry_points\n"
        "for name, point in _entry_points().items():\n"
        "    print(name)\n"
        "    for command in point.load().commands:\n        print(name, command)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    return [(), *(tuple(line.split()) for line in done.stdout.splitlines())]


def test_every_help_is_fast_and_without_torch() -> None:
    code = (
        "import sys\n"
        "from polyzoo.core.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'sklearn', 'matplotlib', 'pyarrow'}\n"
        "print(status, sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    pages = every_help()
    assert ("assets", "fetch") in pages
    for page in pages:
        # Processor time, since a busy machine may keep the process waiting for as long as it likes.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_python(code, *page, "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        name = " ".join(("polyzoo", *page, "--help"))
        assert done.stderr == "0 []\n", f"{name}: {done.stderr}"
        assert seconds < 1.0, f"{name} takes {seconds:.2f} s"
        assert len(done.stdout) > 100


def test_common_flags_cannot_be_taken() -> None:
    @dataclass
    class Bad:
        quiet: bool = False

    with pytest.raises(ValueError, match=r"Bad\.quiet: every command has that flag"):
        Command(summary="x", config=Bad, run="a:b")
