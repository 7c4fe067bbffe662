"""`polyzoo sea serve`: a warm index for editors and agents, over loopback HTTP or stdio."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

from polyzoo.core.errors import PolyzooError
from polyzoo.core.log import get_logger
from polyzoo.sea.search.config import ServeConfig
from polyzoo.sea.search.embedder import Embedder
from polyzoo.sea.search.http_server import SearchServer
from polyzoo.sea.search.layout import find_folder
from polyzoo.sea.search.service import SearchService

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeReport:
    """What a service did until it was stopped."""

    requests: int
    refused: int
    failed: int
    seconds: float


def main(config: ServeConfig) -> ServeReport:
    """Run the command until SIGTERM, SIGINT, or the end of stdin."""
    return serve(config)


def serve(config: ServeConfig, *, embedder: Embedder | None = None) -> ServeReport:
    """Answer requests until told to stop.

    Args:
        config: What to serve, and how.
        embedder: A model that is loaded already; by default the index's.
    """
    start = time.monotonic()
    folder = config.index or find_folder(config.repo)
    service = SearchService(folder, config, embedder=embedder)
    try:
        if config.transport == "stdio":
            _serve_stdio(service, config)
        else:
            _serve_http(service, config)
    finally:
        service.close()
    tally = service.tally
    return ServeReport(
        requests=tally.requests,
        refused=tally.refused,
        failed=tally.failed,
        seconds=round(time.monotonic() - start, 3),
    )


def _serve_http(service: SearchService, config: ServeConfig) -> None:
    server = SearchServer(
        service, config
    )  # first: a port in use is known before the model is loaded
    try:
        service.warm()
        stop = threading.Event()
        with _on_signals(stop.set):
            loop = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1})
            loop.start()
            sys.stdout.write(json.dumps({"listening": server.url}) + "\n")
            sys.stdout.flush()
            stop.wait()
            server.shutdown()
            loop.join()
    finally:
        server.server_close()


class _Stopped(BaseException):
    """A signal arrived while nothing was being answered."""


def _serve_stdio(service: SearchService, config: ServeConfig) -> None:
    """Answer one JSON object a line: {"id", "method", "params"} by {"id", "result" or "error"}."""
    # What a library prints must not land between the answers.
    with os.fdopen(os.dup(sys.__stdout__.fileno() if sys.__stdout__ else 1), "wb") as answers:
        stdout, sys.stdout = sys.stdout, sys.stderr
        idle = True
        stopping = False

        def stop() -> None:
            nonlocal stopping
            stopping = True
            if idle:
                raise _Stopped

        try:
            service.warm()
            with _on_signals(stop):
                while not stopping:
                    line = _read_line(sys.stdin.buffer, config.max_body_bytes)
                    idle = False
                    if line is None:
                        break
                    if line.strip():
                        answers.write(json.dumps(_answer(service, line)).encode() + b"\n")
                        answers.flush()
                    idle = True
        except _Stopped:
            pass
        finally:
            sys.stdout = stdout


def _read_line(stream: IO[bytes], limit: int) -> bytes | None:
    """Read a line; of one above the limit only so much that it can be refused. None at the end."""
    line = stream.readline(limit + 1)
    if not line:
        return None
    if len(line) > limit and not line.endswith(b"\n"):
        while rest := stream.readline(limit):
            if rest.endswith(b"\n"):
                break
    return line


def _answer(service: SearchService, line: bytes) -> dict[str, Any]:
    number: Any = None
    try:
        if len(line) > service.config.max_body_bytes:
            raise PolyzooError(f"the line is above {service.config.max_body_bytes:,} bytes")
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PolyzooError(f"the line is not JSON ({error})") from None
        if not isinstance(request, dict):
            raise PolyzooError('the line must be an object such as {"id": 1, "method": "health"}')
        number = request.get("id")
        unknown = set(request) - {"id", "method", "params"}
        if unknown:
            raise PolyzooError(f"unknown field {min(unknown)!r}; there are id, method and params")
        method, parameters = request.get("method"), request.get("params", {})
        if not isinstance(parameters, dict):
            raise PolyzooError("params must be an object")
        if method == "search":
            return {"id": number, "result": service.search(parameters)}
        if method in ("status", "health"):
            if parameters:
                raise PolyzooError(f"{method} takes no params")
            return {"id": number, "result": getattr(service, method)()}
        raise PolyzooError(f"method={method!r} is not known; choose search, status or health")
    except PolyzooError as error:
        return {"id": number, "error": {"type": type(error).__name__, "message": str(error)}}
    except Exception:  # a bug must not end the service for everybody
        service.tally.failed += 1
        logger.exception("a request failed")
        message = "internal error; see the server's log"
        return {"id": number, "error": {"type": "InternalError", "message": message}}


@contextmanager
def _on_signals(act: Any) -> Iterator[None]:
    """Call `act` on SIGTERM and SIGINT inside the block; only the main thread can be told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal's shape
        act()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
