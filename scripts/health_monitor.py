"""Watch a server: ask it real questions on a schedule, and report when its answers are late, wrong or missing.

python scripts/health_monitor.py --server_url http://127.0.0.1:8000 --dataset_path training_data --interval_s 30

A line for each check goes to stderr, a summary to stdout at the end. Exit status 1 if a limit was ever exceeded.
"""

import contextlib
import json
import signal
from collections.abc import Callable
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.errors import CheckFailedError
from pokegemma.serving.monitor import Monitor, ServerCheck
from pokegemma.serving.monitor_options import MonitorOptions, read_questions
from pokegemma.serving.monitor_outputs import CheckLog, Webhook, format_summary, log_check, serve_metrics
from pokegemma.serving.processes import ServerProcesses
from pokegemma.settings import read_api_key


def run_checks(options: MonitorOptions, monitor: Monitor) -> None:
    """Check until the limits of the options, Ctrl-C or, where it is asked for, a breach; report each check."""
    with contextlib.ExitStack() as stack:
        reports: list[Callable[[ServerCheck], None]] = [log_check]
        if options.log_file:
            reports.append(CheckLog(Path(options.log_file)))
        if options.metrics_port is not None:
            reports.append(stack.enter_context(serve_metrics(monitor, port=options.metrics_port)))
        if options.webhook_url:
            reports.append(Webhook(options.webhook_url, server_url=options.server_url))
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        for check in monitor.watch():
            for report in reports:
                report(check)
            if check.breaches and options.exit_on_breach:
                break


def main() -> None:
    (options,) = parse_options(MonitorOptions, description=__doc__)
    usage = ServerProcesses(options.server_url, options.pid).usage
    api_key = read_api_key("--api_key_variable", options.api_key_variable)
    monitor = Monitor(options, read_questions(options), usage=usage, api_key=api_key)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM of a service manager ends it as Ctrl-C does
    run_checks(options, monitor)
    summary = monitor.summary()
    print(json.dumps(summary, indent=2) if options.json else format_summary(summary))
    if not summary["passed"]:
        raise CheckFailedError(f"limits exceeded: {', '.join(summary['breaches'])}")


if __name__ == "__main__":
    run(main)
