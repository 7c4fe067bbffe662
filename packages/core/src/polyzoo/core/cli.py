"""The `polyzoo` command: groups found through entry points, flags made from dataclasses.

Nothing here imports torch. A command names the function it runs, and only running it imports it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyzoo.core import console
from polyzoo.core.errors import PolyzooError, UsageError

ENTRY_POINTS = "polyzoo.commands"


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand: a config class for its flags, and the function that takes the config.

    Example:
        >>> Command(summary="Train a model", config=TrainConfig, run="polyzoo.sea.train:main")
    """

    summary: str
    """One line for the list of commands."""
    config: type
    """A dataclass; its fields become flags, their docstrings the help."""
    run: str
    """"module:function", called with the config. Its result is what the command prints; a result
    with an `exit_code` sets the process's."""
    render: str | None = None
    """"module:function" from the result to text for people; by default one `key: value` a line."""
    presets: Mapping[str, Callable[[], Any]] | None = None
    """Named configs to start from; a config file and then flags go over them."""

    def __post_init__(self) -> None:
        taken = {"json", "config", "quiet"} & {f.name for f in dataclasses.fields(self.config)}
        if taken:
            raise ValueError(
                f"{self.config.__name__}.{min(taken)}: every command has that flag already"
            )


@dataclass(frozen=True, kw_only=True)
class CommandGroup:
    """The commands of one package, as `polyzoo GROUP COMMAND`."""

    summary: str
    """One line for the list of groups."""
    commands: Mapping[str, Command] = field(default_factory=dict)
    """In the order of the work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the process's exit status.

    0 done, 1 failed, 2 wrong usage, 75 stopped by a signal and resumable, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except PolyzooError as error:
        return _fail(error, error.exit_code, as_json)
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("interrupted"), 130, as_json)
    except BrokenPipeError:
        # The reader has gone (as with `| head`). Point stdout elsewhere, or Python's own last flush
        # would complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
        return _fail(PolyzooError(message), 1, as_json)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        groups = {name: _summary(point) for name, point in sorted(_entry_points().items())}
        print(console.root_help(groups))  # noqa: T201
        return 0
    if arguments[0] in ("-V", "--version"):
        print(console.versions())  # noqa: T201
        return 0
    group_name, *rest = arguments
    group = _load_group(group_name)
    if rest and rest[0] in ("-h", "--help"):
        summaries = {name: command.summary for name, command in group.commands.items()}
        print(console.group_help(group_name, group.summary, summaries))  # noqa: T201
        return 0
    prog = f"polyzoo {group_name}"
    if not rest:
        raise UsageError(f"{prog}: name a command: {', '.join(group.commands)}")
    if rest[0] not in group.commands:
        raise UsageError(f"{prog}: {_not_known('command', rest[0], group.commands)}")
    return _run(f"{prog} {rest[0]}", group.commands[rest[0]], rest[1:])


def _run(prog: str, command: Command, arguments: list[str]) -> int:
    from polyzoo.core import flags  # tyro and pydantic: only where a command is parsed

    parsed = flags.parse(
        command.config,
        arguments,
        prog=prog,
        summary=command.summary,
        presets=command.presets or {},
    )
    if parsed is None:
        return 0
    with console.session(quiet=parsed.quiet, stdout_to_stderr=parsed.json):
        result = _named(command.run)(parsed.config)
    if parsed.json:
        print(console.as_json(result))  # noqa: T201
    elif result is not None:
        text = _named(command.render)(result) if command.render else console.as_lines(result)
        print(text)  # noqa: T201
    return int(getattr(result, "exit_code", 0))


def _named(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if isinstance(error, PolyzooError) or (error.name or "").startswith("polyzoo"):
            raise
        raise PolyzooError(
            f"{module} needs {error.name}, which is not installed; install the package that "
            "brings this command again, with its dependencies"
        ) from error


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _load_group(name: str) -> CommandGroup:
    points = _entry_points()
    if name not in points:
        raise UsageError(f"polyzoo: {_not_known('group', name, points)}")
    try:
        return points[name].load()
    except Exception as error:  # whatever a broken package does, say which one it is
        raise PolyzooError(
            f"polyzoo {name} is not usable: {points[name].value} cannot be loaded "
            f"({type(error).__name__}: {error})"
        ) from error


def _summary(point: importlib.metadata.EntryPoint) -> str:
    try:
        return point.load().summary
    except Exception as error:  # one broken package must not take the others' help away
        return f"(not usable: {type(error).__name__}: {error})"


def _not_known(kind: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names) or 'none'}"
    return f"no {kind} {name!r}; {hint}"


def _fail(error: BaseException, status: int, as_json: bool) -> int:
    with contextlib.suppress(OSError):
        print(console.error_text(error, status, as_json=as_json), file=sys.stderr)  # noqa: T201
    return status


if __name__ == "__main__":
    raise SystemExit(main())
