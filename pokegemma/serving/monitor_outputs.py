"""Outputs of a monitor: a log of JSON lines, metrics for Prometheus, a webhook, and a summary."""

import importlib.util
import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pokegemma.errors import PokegemmaError
from pokegemma.serving.client import ServerError, request, split_url
from pokegemma.serving.monitor import Monitor, ServerCheck
from pokegemma.serving.monitor_limits import STATES
from pokegemma.tables import format_table

logger = logging.getLogger(__name__)

_GIB = 2**30
_WEBHOOK_TIMEOUT_S = 10.0
_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAUGES = {
    "server_up": "1 if the last check was answered, in time or not",
    "healthy": "1 if no limit is exceeded",
    "valid_answer_rate": "Share of the window's checks with a valid answer",
    "process_memory_bytes": "Resident memory of the server's processes",
    "gpu_memory_bytes": "Memory in use on all GPUs of the server's machine",
}


def log_check(check: ServerCheck) -> None:
    """Log a line about a check."""
    latency = "-" if check.latency_s is None else f"{check.latency_s:.2f} s"
    breaches = f"; BREACH: {', '.join(check.breaches)}" if check.breaches else ""
    logger.info("%s %-8s %8s  %s%s", check.time, check.state, latency, check.detail[:200], breaches)


class CheckLog:
    """A file that gets a line of JSON for each check; opened for each, so that it may be moved away meanwhile."""

    def __init__(self, path: Path) -> None:
        """Create the file where there is none.

        Raises:
            PokegemmaError: it cannot be written.
        """
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            raise PokegemmaError(f"{path} cannot be written: {error.strerror}") from error

    def __call__(self, check: ServerCheck) -> None:
        try:
            # Half of a surrogate pair, which a server may answer with, is not UTF-8.
            with open(self._path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps(asdict(check), ensure_ascii=False) + "\n")
        except OSError as error:  # watching goes on when the disk is full
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

        self._monitor, registry = monitor, CollectorRegistry()
        self._checks = Counter("pokegemma_checks", "Checks by their state", ["state"], registry=registry)
        for state in STATES:
            self._checks.labels(state)  # a rate needs the zero before the first
        self._latency = Histogram(
            "pokegemma_answer_latency_seconds",
            "Seconds to the end of an answer",
            registry=registry,
            buckets=_LATENCY_BUCKETS_S,
        )
        self._restarts = Counter("pokegemma_server_restarts", "Restarts of the server", registry=registry)
        self._num_restarts = 0
        self._quantiles = Gauge(
            "pokegemma_window_latency_seconds", "Latency of the window's checks", ["quantile"], registry=registry
        )
        self._gauges = {name: Gauge(f"pokegemma_{name}", text, registry=registry) for name, text in _GAUGES.items()}
        for gauge in self._gauges.values():
            gauge.set(math.nan)  # unknown until the first check
        try:
            self._server, self._thread = start_http_server(port, addr="127.0.0.1", registry=registry)
        except OSError as error:
            raise PokegemmaError(f"--metrics_port {port} cannot be listened on: {error.strerror}") from error

    def __call__(self, check: ServerCheck) -> None:
        window = self._monitor.window()
        self._checks.labels(check.state).inc()
        if check.latency_s is not None:
            self._latency.observe(check.latency_s)
        self._restarts.inc(check.restarts - self._num_restarts)
        self._num_restarts = check.restarts
        gauges, quantile = self._gauges, self._quantiles.labels
        for gauge, value in (
            (gauges["server_up"], check.latency_s is not None),
            (gauges["healthy"], not check.breaches),
            (gauges["valid_answer_rate"], window.valid_rate),
            (gauges["process_memory_bytes"], check.memory_bytes),
            (gauges["gpu_memory_bytes"], check.gpu_memory_bytes),
            (quantile("0.5"), window.latency_p50_s),
            (quantile("0.95"), window.latency_p95_s),
            (quantile("0.99"), window.latency_p99_s),
        ):
            gauge.set(math.nan if value is None else value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Webhook:
    """POST a line of text and the check as JSON when a breach begins, changes or ends.

    The URL may contain a secret: messages contain its host alone.
    """

    def __init__(self, url: str, *, server_url: str) -> None:
        """Check the URL.

        Raises:
            PokegemmaError: it is not an http or https URL.
        """
        self._host = split_url(url, shown="--webhook_url").hostname
        self._url, self._server_url = url, server_url
        self._breaches: frozenset[str] = frozenset()

    def __call__(self, check: ServerCheck) -> None:
        if self._breaches == frozenset(check.breaches):
            return
        event = "breach" if check.breaches else "recovery"
        text = f"{self._server_url}: {', '.join(check.breaches) or 'recovered'} ({check.state}: {check.detail[:200]})"
        body = {"event": event, "text": text, "server": self._server_url, "check": asdict(check)}
        try:
            request("POST", self._url, timeout_s=_WEBHOOK_TIMEOUT_S, body=body)
        except ServerError as error:
            logger.error("the webhook at %s did not get the %s: %s", self._host, event, error.failure)
            return  # sent again after the next check
        self._breaches = frozenset(check.breaches)


def format_summary(summary: dict[str, Any]) -> str:
    """Return a summary as a table for people."""

    def seconds(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f} s"

    def size(value: int | None) -> str:
        return "unknown" if value is None else f"{value / _GIB:.2f} GiB"

    window, last = summary["window"], summary["last_check"] or {}
    states = ", ".join(f"{count} {state}" for state, count in summary["states"].items() if count)
    latencies = ", ".join(f"{name} {seconds(window[f'latency_{name}_s'])}" for name in ("p50", "p95", "p99"))
    breaches = ", ".join(f"{name} ({count} checks)" for name, count in summary["breaches"].items())
    in_window = f"(last {window['num_checks']} checks)"
    rows = {
        "server": summary["server"],
        "checks": f"{summary['num_checks']} ({states or 'none'})",
        "latency": f"{latencies} {in_window}",
        "valid answers": f"{100 * window['valid_rate']:.1f} % {in_window}",
        "memory": f"{size(last.get('memory_bytes'))}, GPUs {size(last.get('gpu_memory_bytes'))}",
        "restarts": str(last.get("restarts", 0)),
        "breaches": breaches or "none",
    }
    return format_table(list(rows.items()), num_left=2)
