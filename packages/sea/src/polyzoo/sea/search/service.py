"""One warm index behind a protocol: checked requests in, plain answers out, never two at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyzoo.core.config import dump, load
from polyzoo.core.errors import ConfigError, PolyzooError
from polyzoo.core.log import get_logger
from polyzoo.sea.search.config import SearchRequest, ServeConfig
from polyzoo.sea.search.embedder import Embedder
from polyzoo.sea.search.index import CodeIndex, Freshness
from polyzoo.sea.search.searcher import Searcher
from polyzoo.sea.search.status import describe

logger = get_logger(__name__)

_FRESH_SECONDS = 10.0
_MAX_PATTERNS = 32
_MAX_CONTEXT = 200


class BusyError(PolyzooError):
    """More requests at a time than the limit, or no turn in time; the client may try again."""


@dataclass(slots=True)
class Tally:
    """What a service has done."""

    requests: int = 0
    refused: int = 0
    failed: int = 0


class SearchService:
    """Answers requests of several threads with one searcher."""

    def __init__(
        self, folder: Path, config: ServeConfig, *, embedder: Embedder | None = None
    ) -> None:
        self.config, self.folder = config, folder
        self.tally = Tally()
        self._searcher = Searcher(folder, embedder=embedder, model=config.model)
        self._turn = threading.Lock()
        self._places = threading.BoundedSemaphore(config.max_requests)
        self._freshness: Freshness | None = None
        self._checked_at = float("-inf")
        self._checking = threading.Lock()
        self._started = time.monotonic()

    def warm(self) -> None:
        """Load the model and look at the repository, so that the first answer is a fast one."""
        self._searcher.load()
        self._check_freshness()

    def close(self) -> None:
        """Release the index once the running request is done."""
        with self._turn:
            self._searcher.close()

    def search(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Answer one question.

        Raises:
            ConfigError: a parameter is unknown, of the wrong type, or above its limit.
            BusyError: too many requests at a time.
        """
        request = load(SearchRequest, parameters)
        self._check_limits(request)
        if not self._places.acquire(blocking=False):
            self.tally.refused += 1
            raise BusyError(f"{self.config.max_requests} requests are running already; try again")
        try:
            if not self._turn.acquire(timeout=self.config.timeout_seconds):
                self.tally.refused += 1
                raise BusyError(f"no turn within {self.config.timeout_seconds} s; try again")
            try:
                self.tally.requests += 1
                result = self._searcher.search(request, freshness=self._freshness)
            finally:
                self._turn.release()
        finally:
            self._places.release()
        self._check_freshness_later()
        return dump(result)

    def status(self) -> dict[str, Any]:
        """Describe the index."""
        index = CodeIndex.open(self.folder)  # its own connection: a search need not wait for it
        try:
            return dump(describe(index))
        finally:
            index.close()

    def health(self) -> dict[str, Any]:
        """Say that the service is alive."""
        uptime = round(time.monotonic() - self._started, 3)
        return {"status": "ok", "uptime_seconds": uptime, "requests": self.tally.requests}

    def _check_limits(self, request: SearchRequest) -> None:
        config = self.config
        for name, value, limit in (
            ("query", len(request.query), config.max_query_characters),
            ("top_k", request.top_k, config.max_top_k),
            ("context", request.context, _MAX_CONTEXT),
            ("paths", len(request.paths), _MAX_PATTERNS),
            ("languages", len(request.languages), _MAX_PATTERNS),
            ("kinds", len(request.kinds), _MAX_PATTERNS),
            ("paths", max(map(len, request.paths), default=0), config.max_query_characters),
        ):
            if value > limit:
                raise ConfigError(f"{name}: {value} is above the limit of {limit}")

    def _check_freshness(self) -> None:
        index = CodeIndex.open(self.folder)
        try:
            self._freshness = index.freshness()
        except PolyzooError as error:  # the repository may be gone; the index still answers
            logger.warning("files cannot be compared with the index: %s", error)
        finally:
            self._checked_at = time.monotonic()
            index.close()

    def _check_freshness_later(self) -> None:
        if time.monotonic() - self._checked_at < _FRESH_SECONDS:
            return
        if self._checking.acquire(blocking=False):
            threading.Thread(target=self._check_and_release, daemon=True).start()

    def _check_and_release(self) -> None:
        try:
            self._check_freshness()
        except PolyzooError as error:
            logger.warning("files cannot be compared with the index: %s", error)
        finally:
            self._checking.release()
