"""The HTTP face of a search service: loopback unless told, small limits, no cross-site requests."""

from __future__ import annotations

import io
import ipaddress
import json
import socket
import sys
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from polyzoo.core.errors import ConfigError, PolyzooError
from polyzoo.core.log import get_logger
from polyzoo.sea.search.config import ServeConfig
from polyzoo.sea.search.service import BusyError, SearchService

logger = get_logger(__name__)

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_LISTS = {"language": "languages", "path": "paths", "kind": "kinds"}
_NUMBERS = {"top_k": int, "context": int, "vector_weight": float, "lexical_weight": float}
_SWITCHES = {"maxsim", "blocks"}
_TEXTS = {"q": "query", "query": "query", "mode": "mode"}


class SearchServer(ThreadingHTTPServer):
    """Serves /search, /status and /health.

    Raises ConfigError for an address other machines can reach, unless that is allowed, and for a
    port in use.
    """

    daemon_threads = False  # on shutdown, answers that are being written are written to the end
    allow_reuse_address = True
    request_queue_size = 16

    def __init__(self, service: SearchService, config: ServeConfig) -> None:
        self.service, self.config = service, config
        self._connections = threading.BoundedSemaphore(config.max_connections)
        family, address = _resolve(config)
        self.address_family = family
        self.hosts = {*_LOOPBACK_NAMES, config.host.lower(), *map(str.lower, config.allow_host)}
        try:
            super().__init__((address, config.port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port} ({error.strerror}); choose another "
                "--port, or 0 for any free one"
            ) from error

    @property
    def url(self) -> str:
        """Address to ask."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, as far as there are threads left."""
        if not self._connections.acquire(blocking=False):
            self.service.tally.refused += 1
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and give the thread's place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - its shape
        """Log instead of printing; a client that went away is no news."""
        logger.debug("a connection failed: %r", sys.exception())

    def knows_host(self, header: str) -> bool:
        """Whether a Host or Origin names this server.

        A page of another site can make a browser send requests here under its own name once that
        name resolves to 127.0.0.1; the name gives it away.
        """
        host = urlsplit(f"//{header}").hostname or ""
        if host in self.hosts:
            return True
        try:
            return self.config.allow_remote and bool(ipaddress.ip_address(host))
        except ValueError:
            return False


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Deadline(io.RawIOBase):
    """Reads a socket until a moment, however slowly the bytes come."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self._end = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took too long to arrive")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    server: SearchServer  # pyright: ignore[reportIncompatibleVariableOverride] - it only serves this
    server_version, sys_version = "polyzoo", ""

    def setup(self) -> None:
        super().setup()
        seconds = self.server.config.timeout_seconds
        self.rfile = io.BufferedReader(_Deadline(self.connection, seconds))

    def do_GET(self) -> None:
        self._respond("GET")

    def do_POST(self) -> None:
        self._respond("POST")

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Answer what the base class refuses in the same shape as everything else."""
        self._send(HTTPStatus(code), _error("RequestError", message or HTTPStatus(code).phrase))

    def _respond(self, method: str) -> None:
        service = self.server.service
        try:
            self._check_origin()
            answer = self._route(method)
            status = HTTPStatus.OK
        except _RefusedError as error:
            service.tally.refused += 1
            status, answer = error.status, _error("RequestError", str(error))
        except BusyError as error:
            status, answer = HTTPStatus.SERVICE_UNAVAILABLE, _error("BusyError", str(error))
        except PolyzooError as error:
            service.tally.refused += 1
            status, answer = HTTPStatus.BAD_REQUEST, _error(type(error).__name__, str(error))
        except TimeoutError:
            raise
        except Exception:  # a bug must not end the service for everybody
            service.tally.failed += 1
            logger.exception("a request failed")
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            answer = _error("InternalError", "internal error; see the server's log")
        self._send(status, answer)

    def _check_origin(self) -> None:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.knows_host(hosts[0]):
            raise _RefusedError(
                HTTPStatus.FORBIDDEN,
                f"host={', '.join(hosts)!r} is not this server's name; use {self.server.url}, or "
                "start it with --allow-host NAME",
            )
        origin = self.headers.get("Origin")
        if origin is not None and not self.server.knows_host(urlsplit(origin).netloc):
            raise _RefusedError(
                HTTPStatus.FORBIDDEN, f"origin={origin!r}: pages of other sites may not ask"
            )
        if self.headers.get("Sec-Fetch-Site") == "cross-site":
            raise _RefusedError(HTTPStatus.FORBIDDEN, "pages of other sites may not ask")

    def _route(self, method: str) -> dict[str, Any]:
        url = urlsplit(self.path)
        if url.path == "/search":
            return self.server.service.search(
                _from_query(url.query) if method == "GET" else self._body()
            )
        if url.path in ("/status", "/health"):
            if method != "GET":
                raise _RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, f"{url.path} answers GET only")
            return getattr(self.server.service, url.path[1:])()
        raise _RefusedError(HTTPStatus.NOT_FOUND, "there are /search, /status and /health")

    def _body(self) -> Mapping[str, Any]:
        limit = self.server.config.max_body_bytes
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send Content-Type: application/json"
            )
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "send the body's Content-Length")
        if len(length) > 12 or int(length) > limit:
            raise _RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is above {limit:,} bytes"
            )
        data = self.rfile.read(int(length))
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"the body is not JSON ({error})") from None
        if not isinstance(body, dict):
            raise _RefusedError(
                HTTPStatus.BAD_REQUEST, 'the body must be an object: {"query": "..."}'
            )
        return body

    def _send(self, status: HTTPStatus, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.connection.settimeout(self.server.config.timeout_seconds)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Content-Type-Options", "nosniff")
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(data)


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message}}


def _from_query(text: str) -> dict[str, Any]:
    """Read /search?q=...&top_k=5&language=python&language=go."""
    try:
        given = parse_qs(
            text, keep_blank_values=True, strict_parsing=bool(text), max_num_fields=200
        )
    except ValueError as error:
        raise _RefusedError(
            HTTPStatus.BAD_REQUEST, f"the query string cannot be read ({error})"
        ) from None
    found: dict[str, Any] = {}
    for name, values in given.items():
        if name in _LISTS:
            found[_LISTS[name]] = values
            continue
        if len(values) > 1:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"{name} is given {len(values)} times")
        if name in _TEXTS:
            found[_TEXTS[name]] = values[0]
        elif name in _NUMBERS:
            try:
                found[name] = _NUMBERS[name](values[0])
            except ValueError:
                raise _RefusedError(
                    HTTPStatus.BAD_REQUEST, f"{name}={values[0]!r} is not a number"
                ) from None
        elif name in _SWITCHES:
            if values[0] not in ("true", "false"):
                raise _RefusedError(
                    HTTPStatus.BAD_REQUEST, f"{name}={values[0]!r} must be true or false"
                )
            found[name] = values[0] == "true"
        else:
            known = sorted([*_TEXTS, *_NUMBERS, *_SWITCHES, *_LISTS])
            raise _RefusedError(
                HTTPStatus.BAD_REQUEST, f"{name!r} is not one of {', '.join(known)}"
            )
    return found


def _resolve(config: ServeConfig) -> tuple[socket.AddressFamily, str]:
    try:
        answers = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host={config.host!r} cannot be resolved ({error})") from None
    # IPv4 first, as localhost is expected to mean 127.0.0.1.
    answers.sort(key=lambda answer: answer[0] != socket.AF_INET)
    addresses = [str(answer[4][0]) for answer in answers]
    if not config.allow_remote and not all(
        ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses
    ):
        raise ConfigError(
            f"host={config.host!r} can be reached from other machines, and there is no login: use "
            "127.0.0.1, or add --allow-remote if everyone there may read the indexed code"
        )
    return answers[0][0], addresses[0]
