from __future__ import annotations

import json
import os
import re

import pytest

from support.cli import run_cli, run_python
from support.runs import checkpoint_folder, fit, mean_error, tiny_config
from support.workspace import ROOT


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("inspected") / "run"
    config = tiny_config(folder, steps=4, eval_every=2, best_metric="error", best_mode="min")
    fit(config, eval_fn=mean_error)
    return folder


def test_inspect_says_how_a_run_stands(run) -> None:
    done = run_cli("training", "inspect", run, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["state"], report["step"], report["total_steps"]) == ("finished", 4, 4)
    assert [c["step"] for c in report["checkpoints"]] == [1, 2, 3, 4]
    assert all(c["fault"] is None and c["strategy"] == "single" for c in report["checkpoints"])
    assert report["train"]["step"] == report["evaluation"]["step"] == 4
    assert report["best"]["value"] <= report["evaluation"]["metrics"]["error"]
    text = run_cli("training", "inspect", run).stdout
    assert "finished, step 4 of 4" in text
    assert "checkpoint 4: " in text
    assert "evaluated at 4: error" in text


def test_inspect_finds_damage_and_fails(run, tmp_path) -> None:
    file = checkpoint_folder(run, 3) / "rank00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9] + b"\x00" + content[-8:])
    try:
        done = run_cli("training", "inspect", run)
        assert done.returncode == 1
        assert "DAMAGED: rank00000.safetensors: its content has changed" in done.stdout
        assert run_cli("training", "inspect", run, "--no-verify").returncode == 0
    finally:
        file.write_bytes(content)


def test_inspect_knows_the_living_from_the_dead(run) -> None:
    status = run / "status.json"
    before = status.read_text()
    status.write_text(before.replace("finished", "running"))
    try:
        for process, state in ((os.getpid(), "running"), (2**22 + 1, "killed")):
            (run / ".lock").write_text(f"process {process} (training)")
            done = run_cli("training", "inspect", run, "--json")
            assert json.loads(done.stdout)["state"] == state
    finally:
        status.write_text(before)
        (run / ".lock").write_text("")


def test_a_folder_without_a_run_is_an_error(tmp_path) -> None:
    done = run_cli("training", "inspect", tmp_path)
    assert done.returncode == 1
    assert "holds no training run" in done.stderr


@pytest.mark.parametrize("arguments", [["training", "--help"], ["training", "inspect", "--help"]])
def test_help_needs_no_torch(arguments) -> None:
    code = (
        "import sys\n"
        "from polyzoo.core.cli import main\n"
        f"assert main({arguments!r}) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "inspect" in done.stdout


def test_inspecting_needs_no_torch(run) -> None:
    code = (
        "import sys\n"
        "from polyzoo.core.cli import main\n"
        f"assert main(['training', 'inspect', {str(run)!r}]) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_the_readme_example_runs_and_resumes(tmp_path) -> None:
    text = (ROOT / "packages" / "training" / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert block is not None
    code = f"import os; os.chdir({str(tmp_path)!r})\n{block[1]}"
    outputs = [run_python(code) for _ in range(2)]
    assert [done.returncode for done in outputs] == [0, 0], outputs[0].stderr
    steps, slope = outputs[0].stdout.split()
    assert steps == "200"
    assert float(slope) == pytest.approx(3, abs=0.1)
    assert outputs[1].stdout == outputs[0].stdout
