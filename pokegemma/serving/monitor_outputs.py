"""Where a monitor's findings go: a log of JSON lines, Prometheus, and a webhook."""

import importlib.util
import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from pokegemma.errors import PokegemmaError
from pokegemma.serving.client import ServerError, request
from pokegemma.serving.monitor import STATES, Check, Monitor

logger = logging.getLogger(__name__)

_WEBHOOK_TIMEOUT_S = 10.0
_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class CheckLog:
    """A file that gets a line of JSON for each check; opened for each, so that it may be moved away meanwhile."""

    def __init__(self, path: Path) -> None:
        """See whether it can be written.

        Raises:
            PokegemmaError: it cannot.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8"):
                pass
        except OSError as error:
            raise PokegemmaError(f"{path} cannot be written: {error.strerror}") from error

    def __call__(self, check: Check) -> None:
        try:
            # A server may answer with half of a surrogate pair, which is no UTF-8.
            with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(asdict(check), ensure_ascii=False) + "\n")
        except OSError as error:  # a full disk is no reason to stop watching
            logger.error("%s could not be written: %s", self._path, error.strerror)


class PrometheusMetrics:
    """Metrics of a monitor, served at http://127.0.0.1:PORT/metrics."""

    def __init__(self, monitor: Monitor, *, port: int) -> None:
        """Start to serve them.

        Raises:
            PokegemmaError: prometheus-client is missing, or the port is taken.
        """
        if importlib.util.find_spec("prometheus_client") is None:
            raise PokegemmaError("--metrics_port: prometheus-client is missing; ./init.sh --with serve installs it")
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

        registry = CollectorRegistry()
        self._monitor, self._num_restarts = monitor, 0
        self._checks = Counter("pokegemma_checks", "Checks by what they found", ["state"], registry=registry)
        for state in STATES:
            self._checks.labels(state)  # a rate needs the zero before the first
        self._latency = Histogram(
            "pokegemma_answer_latency_seconds",
            "Seconds to the end of an answer",
            registry=registry,
            buckets=_LATENCY_BUCKETS_S,
        )
        self._restarts = Counter(
            "pokegemma_server_restarts", "Times that the server was started anew", registry=registry
        )
        gauge = {
            name: Gauge(f"pokegemma_{name}", text, registry=registry)
            for name, text in (
                ("server_up", "1 if the last check was answered, in time or not"),
                ("healthy", "1 if no limit is exceeded"),
                ("valid_answer_rate", "Share of the window's checks with a valid answer"),
                ("process_memory_bytes", "Resident memory of the server's processes"),
                ("gpu_memory_bytes", "Memory in use on all GPUs of the server's machine"),
            )
        }
        self._gauge = gauge
        for one in gauge.values():
            one.set(math.nan)  # unknown until the first check
        self._quantiles = Gauge(
            "pokegemma_window_latency_seconds", "Latency of the window's checks", ["quantile"], registry=registry
        )
        try:
            self._server, self._thread = start_http_server(port, addr="127.0.0.1", registry=registry)
        except OSError as error:
            raise PokegemmaError(f"--metrics_port {port} cannot be listened on: {error.strerror}") from error

    def __call__(self, check: Check) -> None:
        window = self._monitor.window()
        self._checks.labels(check.state).inc()
        if check.latency_s is not None:
            self._latency.observe(check.latency_s)
        self._restarts.inc(check.restarts - self._num_restarts)
        self._num_restarts = check.restarts
        values: dict[str, float | None] = {
            "server_up": float(check.latency_s is not None),
            "healthy": float(not check.breaches),
            "valid_answer_rate": window.valid_rate,
            "process_memory_bytes": check.memory_bytes,
            "gpu_memory_bytes": check.gpu_memory_bytes,
        }
        for name, value in values.items():
            self._gauge[name].set(math.nan if value is None else value)
        for quantile, value in (
            ("0.5", window.latency_p50_s),
            ("0.95", window.latency_p95_s),
            ("0.99", window.latency_p99_s),
        ):
            self._quantiles.labels(quantile).set(math.nan if value is None else value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Webhook:
    """POST a line of text and the check as JSON when limits begin or cease to be exceeded.

    The URL may hold a secret: messages name its host alone.
    """

    def __init__(self, url: str, *, server_url: str) -> None:
        """Check the URL.

        Raises:
            PokegemmaError: it is none.
        """
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise PokegemmaError("--webhook_url: not an http or https URL")
        self._url, self._host, self._server_url = url, parts.hostname, server_url
        self._breaches: tuple[str, ...] = ()

    def __call__(self, check: Check) -> None:
        if set(check.breaches) == set(self._breaches):
            return
        event = "breach" if check.breaches else "recovery"
        text = f"{self._server_url}: {', '.join(check.breaches) or 'recovered'} ({check.state}: {check.detail[:200]})"
        body: dict[str, Any] = {"event": event, "text": text, "server": self._server_url, "check": asdict(check)}
        try:
            request("POST", self._url, timeout_s=_WEBHOOK_TIMEOUT_S, body=body)
        except ServerError as error:
            logger.error("the webhook at %s was not told of the %s: %s", self._host, event, error.failure)
            return  # told again after the next check
        self._breaches = check.breaches
