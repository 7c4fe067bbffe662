from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from PIL import Image

from polyzoo.training import CheckpointConfig, LogConfig, StepOutput
from polyzoo.training.plots import running_mean
from support.runs import fit, logged, mean_error, tiny_config


def test_every_line_is_json_with_what_people_plot(tmp_path) -> None:
    config = tiny_config(tmp_path, steps=7, eval_every=3, grad_accum=2)
    config = dataclasses.replace(config, log=LogConfig(every=2, progress=False, plots=False))
    fit(config, eval_fn=mean_error)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines] == [
        ("train", 2), ("eval", 3), ("train", 4), ("train", 6), ("eval", 6), ("train", 7),
        ("eval", 7),
    ]  # fmt: skip
    last = lines[-2]
    assert {"loss", "lr", "grad_norm", "samples_per_second", "step_seconds", "epoch"} <= last.keys()
    assert last["metrics"].keys() == {"worst"}
    # Epochs of 44 samples: steps of 8 samples, the sixth with the last 4.
    assert (last["samples"], last["epoch"]) == (52, 1)


def test_a_log_line_is_the_mean_over_its_window(tmp_path) -> None:
    for name, every in (("each", 1), ("mean", 5)):
        config = tiny_config(tmp_path / name)
        fit(dataclasses.replace(config, log=LogConfig(every=every, progress=False, plots=False)))
    for value in ("loss", "grad_norm", "worst"):
        each = [number for _, number in logged(tmp_path / "each", value)]
        mean = [number for _, number in logged(tmp_path / "mean", value)]
        assert mean == [pytest.approx(sum(each[:5]) / 5), pytest.approx(sum(each[5:]) / 5)]


def test_tokens_are_counted_where_the_step_counts_them(tmp_path) -> None:
    def step(model, batch, ctx):
        loss = (model(batch["x"]) - batch["y"]).square().mean()
        return StepOutput(loss=loss, tokens=batch["x"].numel())

    fit(tiny_config(tmp_path, steps=2), step_fn=step)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["tokens_per_second"] == pytest.approx(6 * line["samples_per_second"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:google")
def test_tensorboard_reads_what_was_written(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = LogConfig(every=1, progress=False, plots=False, tensorboard=True)
    config = tiny_config(tmp_path, steps=4, eval_every=2, log=log)
    fit(config, eval_fn=mean_error)
    fit(
        dataclasses.replace(config, steps=6, checkpoint=CheckpointConfig(from_step=3)),
        eval_fn=mean_error,
    )
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {"train/loss", "train/lr", "train/worst", "eval/error"} <= set(board.Tags()["scalars"])
    points = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert points == [(step, pytest.approx(value)) for step, value in logged(tmp_path)]


def test_plots_of_a_run_are_pictures(tmp_path) -> None:
    had_pyplot = "matplotlib.pyplot" in sys.modules
    log = LogConfig(every=1, progress=False, plots=True)
    fit(tiny_config(tmp_path, eval_every=5, log=log), eval_fn=mean_error)
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["evaluation.png", "metrics.png", "training.png"]
    for name in names:
        with Image.open(tmp_path / "plots" / name) as image:
            image.load()
            assert image.format == "PNG"
            assert min(image.size) > 250
            assert len(image.convert("RGB").getcolors(2**24) or []) > 20
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_long_curves_get_a_running_mean() -> None:
    assert running_mean([1.0, 2.0, 6.0, 3.0], 1) == [1.5, 3.0, pytest.approx(11 / 3), 4.5]
    assert running_mean([4.0, 2.0], 0) == [4.0, 2.0]


def test_progress_is_plain_lines_on_stderr_where_it_is_no_terminal(tmp_path, capsys) -> None:
    log = LogConfig(every=5, progress=True, plots=False)
    fit(tiny_config(tmp_path / "my-run", log=log))
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("my-run: 10/10 step [")
    assert "loss " in line
    assert "lr " in line
    assert "samples/s" in line
