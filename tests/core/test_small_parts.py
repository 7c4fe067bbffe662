"""Devices, dtypes, seeds, random states, logging, progress and lazy packages."""

from __future__ import annotations

import io
import logging
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

import polyzoo.core
from polyzoo.core import errors
from polyzoo.core.device import resolve_device, resolve_dtype
from polyzoo.core.errors import ConfigError, MissingExtraError, PolyzooError
from polyzoo.core.lazy import attach, import_extra
from polyzoo.core.log import get_logger, is_quiet, progress, quietly
from polyzoo.core.seeding import (
    capture_random_state,
    item_generator,
    restore_random_state,
    seed_everything,
)


def test_devices_are_never_chosen_silently() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.backends.mps.is_available():
        assert resolve_device().type == expected
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device("meta").type == "meta"
    for name in ("gpu", "cuda:x", "", "xpu"):
        with pytest.raises(ConfigError, match=r"use auto, cpu, cuda, cuda:N or mps"):
            resolve_device(name)
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ConfigError, match=r"no CUDA device; use cpu or auto|CUDA devices are 0 to"):
        resolve_device(absent)


def test_dtypes() -> None:
    assert resolve_dtype() == resolve_dtype(None) == torch.float32
    assert resolve_dtype("bf16") == resolve_dtype("bfloat16") == torch.bfloat16
    assert resolve_dtype(torch.float64) == torch.float64
    with pytest.raises(ConfigError, match=r"dtype='int4': use auto, float32"):
        resolve_dtype("int4")


def draw_all() -> list[float]:
    numpy = np.random  # the global state is what is captured
    return [random.random(), random.gauss(), numpy.rand(), numpy.randn(), *torch.randn(3)]


def test_one_seed_rules_every_source() -> None:
    seed_everything(7)
    first = draw_all()
    assert draw_all() != first
    seed_everything(7)
    assert draw_all() == first
    for seed in (-1, 2**32):
        with pytest.raises(ConfigError, match=rf"seed={seed}: must be 0 to 4294967295"):
            seed_everything(seed)


def test_random_states_come_back_through_a_file() -> None:
    seed_everything(3)
    draw_all()
    file = io.BytesIO()
    torch.save(capture_random_state(), file)
    expected = [draw_all() for _ in range(3)]
    seed_everything(99)
    file.seek(0)
    restore_random_state(torch.load(file, weights_only=True))
    assert [draw_all() for _ in range(3)] == expected
    save({"key": capture_random_state()["numpy"]["key"]})  # a dtype that safetensors knows


def test_an_item_draws_the_same_whatever_came_before() -> None:
    drawn = [torch.randn(4, generator=item_generator(5, i)) for i in range(50)]
    assert torch.equal(torch.randn(4, generator=item_generator(5, 17)), drawn[17])
    assert len({tuple(values.tolist()) for values in drawn}) == 50
    assert not torch.equal(torch.randn(4, generator=item_generator(6, 17)), drawn[17])
    assert not torch.equal(
        torch.randn(4, generator=item_generator(1, 11)),
        torch.randn(4, generator=item_generator(11, 1)),
    )


def test_loggers_are_silent_until_asked(capsys: pytest.CaptureFixture[str]) -> None:
    get_logger("polyzoo.testing.part").warning("unheard")
    get_logger("polyzoo.testing.other")
    assert capsys.readouterr() == ("", "")
    handlers = logging.getLogger("polyzoo.testing").handlers
    assert [type(handler) for handler in handlers] == [logging.NullHandler]


def test_progress_in_a_file_is_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(5), description="Reading", unit="file")) == list(range(5))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Reading: 5/5 file [")
    assert err.count("\n") == 1
    assert "\r" not in err


def test_progress_counts_updates_and_tells_an_early_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(total=10, description="Steps") as bar:
        bar.update(3)
        bar.set_postfix(loss=0.5)
    assert "Steps: 3/10 it" in capsys.readouterr().err


def test_progress_obeys_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), description="x", quiet=True)) == [0, 1, 2]
    with quietly():
        assert is_quiet()
        assert list(progress(range(3), description="x")) == [0, 1, 2]
        with quietly(False):
            assert is_quiet(), "an outer quiet holds"
    assert not is_quiet()
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)  # the stream, not our code
    list(progress(range(5), description="Reading"))
    assert "\r" in terminal.getvalue()


def test_lazy_packages_load_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lazy_sample"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from polyzoo.core.lazy import attach\n"
        '__getattr__, __dir__, __all__ = attach(__name__, {"Thing": ".thing", "thing": ".thing"})\n'
    )
    (package / "thing.py").write_text("class Thing: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    import lazy_sample  # type: ignore[import-not-found]

    assert "lazy_sample.thing" not in sys.modules
    assert lazy_sample.__all__ == ["Thing", "thing"]
    assert {"Thing", "__all__"} <= set(dir(lazy_sample))
    assert lazy_sample.Thing.__name__ == "Thing"
    assert isinstance(lazy_sample.thing, types.ModuleType)
    with pytest.raises(AttributeError, match="'lazy_sample' has no attribute 'nothing'"):
        _ = lazy_sample.nothing


def test_attach_serves_only_what_is_listed() -> None:
    serve, listing, public = attach("polyzoo.core", {"load": ".config"})
    assert public == ["load"]
    assert "load" in listing()
    with pytest.raises(AttributeError):
        serve("save")


def test_every_error_is_ours_and_served_by_the_root() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert all(issubclass(kind, PolyzooError) for kind in kinds)
    assert sorted(kind.__name__ for kind in kinds) == polyzoo.core.__all__
    assert all(getattr(polyzoo.core, kind.__name__) is kind for kind in kinds)
    assert {kind.exit_code for kind in kinds} == {1, 2, 75}


def test_a_missing_extra_says_what_to_install() -> None:
    assert import_extra("json", install="x").loads("1") == 1
    with pytest.raises(MissingExtraError, match=r"run: pip install 'polyzoo-core\[none\]'"):
        import_extra("no_such_module", install="polyzoo-core[none]")
