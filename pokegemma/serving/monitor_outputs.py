"""Outputs of a monitor: a log of JSON lines, metrics for Prometheus, a webhook, and a summary."""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pokegemma.environment import GIB
from pokegemma.errors import PokegemmaError
from pokegemma.serving.client import ServerError, request, split_url
from pokegemma.serving.monitor import STATES, Monitor, ServerCheck, summarize_window
from pokegemma.tables import format_table

logger = logging.getLogger(__name__)

_WEBHOOK_TIMEOUT_S = 10.0
_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_GAUGES: dict[str, tuple[str, Callable[[ServerCheck, dict[str, Any]], float | None]]] = {
    "server_up": ("1 if the last check was answered, in time or not", lambda check, _: check.latency_s is not None),
    "healthy": ("1 if no limit is exceeded", lambda check, _: not check.breaches),
    "valid_answer_rate": ("Share of the window's checks with a valid answer", lambda _, window: window["valid_rate"]),
    "process_memory_bytes": ("Resident memory of the server's processes", lambda check, _: check.memory_bytes),
    "gpu_memory_bytes": ("Memory in use on the GPUs of the server's machine", lambda check, _: check.gpu_memory_bytes),
}


def log_check(check: ServerCheck) -> None:
    """Log a line about a check."""
    latency = "-" if check.latency_s is None else f"{check.latency_s:.2f} s"
    breaches = f"; BREACH: {', '.join(check.breaches)}" if check.breaches else ""
    logger.info("%s %-8s %8s  %s%s", check.time, check.state, latency, check.detail[:200], breaches)


class CheckLog:
    """A file that gets a line of JSON for each check; opened for each, so that it may be moved away meanwhile."""

    def __init__(self, path: Path) -> None:
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


@contextlib.contextmanager
def serve_metrics(monitor: Monitor, *, port: int) -> Iterator[Callable[[ServerCheck], None]]:
    """Serve metrics at http://127.0.0.1:PORT/metrics while a block runs; yield what adds a check to them.

    Raises:
        PokegemmaError: prometheus-client is missing, or the port is taken.
    """
    try:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
    except ModuleNotFoundError as error:
        raise PokegemmaError("--metrics_port needs prometheus-client; ./init.sh --with serve installs it") from error
    new = {"namespace": "pokegemma", "registry": CollectorRegistry()}
    states = Counter("checks", "Checks by their state", ["state"], **new)
    for state in STATES:
        states.labels(state)  # a rate needs the zero before the first
    latency = Histogram("answer_latency_seconds", "Seconds to the end of an answer", buckets=_LATENCY_BUCKETS_S, **new)
    restarts, num_restarts = Counter("server_restarts", "Restarts of the server", **new), 0
    quantiles = Gauge("window_latency_seconds", "Latency of the window's checks", ["quantile"], **new)
    gauges = {name: Gauge(name, text, **new) for name, (text, _) in _GAUGES.items()}
    for gauge in gauges.values():
        gauge.set(math.nan)  # unknown until the first check

    def add(check: ServerCheck) -> None:
        nonlocal num_restarts
        window = summarize_window(monitor.checks)
        states.labels(check.state).inc()
        if check.latency_s is not None:
            latency.observe(check.latency_s)
        restarts.inc(check.restarts - num_restarts)
        num_restarts = check.restarts
        values = [(gauges[name], read(check, window)) for name, (_, read) in _GAUGES.items()]
        values += [(quantiles.labels(percent / 100), window[f"latency_p{percent}_s"]) for percent in (50, 95, 99)]
        for gauge, value in values:
            gauge.set(math.nan if value is None else value)

    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=new["registry"])
    except OSError as error:
        raise PokegemmaError(f"--metrics_port {port} cannot be listened on: {error.strerror}") from error
    try:
        yield add
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Webhook:
    """POST a line of text and the check as JSON when a breach begins, changes or ends.

    The URL may contain a secret: messages contain its host alone.
    """

    def __init__(self, url: str, *, server_url: str) -> None:
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
    window, last = summary["window"], summary["last_check"] or {}
    figures = [window["latency_p50_s"], window["latency_p95_s"], window["latency_p99_s"]]
    latencies = " / ".join("-" if seconds is None else f"{seconds:.3f}" for seconds in figures)
    sizes = [last.get("memory_bytes"), last.get("gpu_memory_bytes")]
    memory, gpu_memory = ("unknown" if size is None else f"{size / GIB:.2f} GiB" for size in sizes)
    states = ", ".join(f"{count} {state}" for state, count in summary["states"].items() if count)
    rows = {
        "server": summary["server"],
        "checks": f"{summary['num_checks']} ({states or 'none'})",
        f"last {window['num_checks']}": f"{latencies} s (p50 / p95 / p99), {100 * window['valid_rate']:.1f} % valid",
        "memory": f"{memory}, GPUs {gpu_memory}",
        "restarts": str(last.get("restarts", 0)),
        "breaches": ", ".join(f"{name} ({count} checks)" for name, count in summary["breaches"].items()) or "none",
    }
    return format_table(list(rows.items()), num_left=2)
