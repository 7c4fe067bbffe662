"""Signals ask a run to stop: it saves at a whole step, and its loader processes do not mind."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time

import pytest

from polyzoo.core.errors import Interrupted, LockedError
from polyzoo.training import CheckpointConfig, DataConfig
from polyzoo.training.checkpoint.store import find_fault
from polyzoo.training.data import DataStream
from polyzoo.training.signals import ASKING
from support.forks import Fork
from support.runs import (
    Points,
    assert_same_run,
    checkpoint_folder,
    fit,
    mean_error,
    slow,
    steps_logged,
    store_of,
    tiny_config,
)

# Python 3.12 and later warn of any fork beside threads; these children only train.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_saves_and_exits_75_and_resuming_equals_never_stopping(number, tmp_path) -> None:
    config = tiny_config(tmp_path / "whole", steps=8, data=DataConfig(workers=1))
    fit(config)
    stopped = dataclasses.replace(
        config, run_dir=tmp_path / "run", checkpoint=CheckpointConfig(every=1000)
    )
    child = Fork(lambda: fit(stopped, step_fn=slow(0.1)), tmp_path / "stderr")
    child.until(lambda: steps_logged(tmp_path / "run") >= 2)
    with pytest.raises(LockedError, match=rf"in use by process {child.pid} \(training\)"):
        fit(stopped)
    child.send(number)
    assert child.wait() == 75, child.errors()
    at = store_of(stopped).steps()[-1]
    assert 2 <= at < 8
    assert child.errors() == (
        f"stopped by {number.name} after step {at} of 8, which is saved; the same command resumes\n"
    )
    assert fit(stopped).interrupted
    assert_same_run(tmp_path / "whole", tmp_path / "run", 8)


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_to_the_whole_group_saves_too(number, tmp_path) -> None:
    """As `timeout`, Slurm and terminals send it: the loader processes get it as well."""
    config = tiny_config(tmp_path / "whole", steps=8, data=DataConfig(workers=2))
    fit(config)
    stopped = dataclasses.replace(
        config, run_dir=tmp_path / "run", checkpoint=CheckpointConfig(every=1000)
    )
    child = Fork(lambda: fit(stopped, step_fn=slow(0.1)), tmp_path / "stderr", own_group=True)
    child.until(lambda: steps_logged(tmp_path / "run") >= 2)
    child.send_to_group(number)
    assert child.wait() == 75, child.errors()
    assert child.errors().startswith(f"stopped by {number.name} after step ")
    [at] = store_of(stopped).steps()
    assert 2 <= at < 8
    assert find_fault(checkpoint_folder(tmp_path / "run", at)) is None
    assert fit(stopped).interrupted
    assert_same_run(tmp_path / "whole", tmp_path / "run", 8)


def test_signals_between_the_start_and_the_settling_of_workers_do_no_harm(tmp_path) -> None:
    started = tmp_path / "started"

    def read() -> None:
        for number in ASKING:
            signal.signal(number, lambda *_: None)
        started.touch()
        for _ in range(4):
            stream = DataStream(Points(), DataConfig(workers=2), batch_size=4, collate=None, seed=0)
            stream.take(3)
            stream.close()

    child = Fork(read, tmp_path / "stderr", own_group=True)
    child.until(started.exists)
    sent = 0
    while child.running:
        child.send_to_group(ASKING[sent % len(ASKING)])
        sent += 1
        time.sleep(0.0002)
    assert child.wait() == 0, child.errors()
    assert sent > 100


def test_a_worker_ends_when_its_parent_asks() -> None:
    """Python ends what is left at exit like this, and then waits for it."""
    stream = DataStream(Points(), DataConfig(workers=1), batch_size=4, collate=None, seed=0)
    stream.take(1)
    [worker] = multiprocessing.active_children()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
    stream.close()


class Signalling(Points):
    """Sends SIGTERM to its own process when an item is read for the nth time."""

    def __init__(self, reads: int, *, fails: bool) -> None:
        super().__init__()
        self.reads = reads
        self.fails = fails

    def __getitem__(self, index: int):
        self.reads -= 1
        if self.reads == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            if self.fails:
                raise OSError("the data went away")
        return super().__getitem__(index)


@pytest.mark.parametrize("fails", [False, True])
def test_a_signal_while_waiting_for_data_begins_no_step(fails, tmp_path) -> None:
    config = tiny_config(tmp_path / "whole", steps=6, batch_size=4, grad_accum=2)
    fit(config)
    stopped = dataclasses.replace(config, run_dir=tmp_path / "run")
    # The fourth step's second micro-batch, at its third sample.
    data = Signalling(3 * 8 + 4 + 3, fails=fails)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 3 of 6, which is saved"):
        fit(stopped, train_data=data)
    assert store_of(stopped).steps() == [1, 2, 3]
    fit(stopped)
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)


def test_a_signal_during_evaluation_begins_no_step(tmp_path) -> None:
    config = tiny_config(tmp_path / "whole", steps=6, eval_every=2)
    fit(config, eval_fn=mean_error)
    stopped = dataclasses.replace(config, run_dir=tmp_path / "run")

    def interrupted(model, ctx):
        if ctx.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return mean_error(model, ctx)

    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 4 of 6, which is saved"):
        fit(stopped, eval_fn=interrupted)
    fit(stopped, eval_fn=mean_error)
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)


def test_a_second_ctrl_c_aborts_at_once(tmp_path) -> None:
    config = tiny_config(tmp_path / "run", checkpoint=CheckpointConfig(every=1000))
    inside = tmp_path / "inside"

    def endless(model, batch, ctx):
        inside.touch()
        return slow(60)(model, batch, ctx)

    child = Fork(lambda: fit(config, step_fn=endless), tmp_path / "stderr")
    child.until(inside.exists)
    child.send(signal.SIGINT)
    time.sleep(0.1)
    child.send(signal.SIGINT)
    assert child.wait() == 130
    assert store_of(config).steps() == []


def test_handlers_come_back(tmp_path) -> None:
    before = [signal.getsignal(number) for number in ASKING]
    fit(tiny_config(tmp_path, steps=1))
    assert [signal.getsignal(number) for number in ASKING] == before
