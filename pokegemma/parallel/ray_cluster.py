"""Map a function over work items on a Ray cluster (Ray Data); call it through `pokegemma.parallel.workers`.

All machines must see the same files under the same paths (shared storage) and have the same pokegemma; each worker
checks both before its first item. Items and results are pickled; write what is large to files.
"""

import contextlib
import logging
import os
import pickle
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pokegemma.errors import PokegemmaError
from pokegemma.parallel.ray_worker import Job, RayWorker, WorkerFailure, code_versions, list_names

logger = logging.getLogger(__name__)

LOCAL, AUTO, CLIENT = "local", "auto", "ray://"
_CONNECT_TIMEOUT_S, _MAX_CONNECTS = 10, 3
_EXECUTOR_THREAD, _EXECUTOR_TIMEOUT_S = "StreamingExecutor-", 60.0
_MAX_ATTEMPTS = 3  # at an item whose worker dies: of a lost machine, or of the item itself
_OBJECT_STORE_BYTES = 256 * 1024 * 1024


def map_on_cluster(
    function: Callable[[Any, Any], Any],
    items: Sequence[tuple[int, Any]],
    *,
    address: str,
    num_workers: int,
    initialize: Callable[[], Any] | None = None,
    folders: Sequence[Path] = (),
    num_gpus: float = 0,
) -> Iterator[tuple[int, Any]]:
    """Yield (index, result) of each (index, item), in the order in which they are done.

    Args:
        address: "local" starts Ray here and ends it, "auto" finds the cluster of this machine, host:port or ray://host:port.
        num_workers: 0 for as many as the cluster has CPUs, or with `num_gpus` GPUs for.
        folders: what every machine must see.
        num_gpus: of each worker.

    Raises:
        PokegemmaError: no Ray, no such cluster, a machine that lacks a folder, a worker that died, or what
            `function` raised; its OSError too is raised here.
    """
    job = Job(function, initialize, {Path(folder): list_names(folder) for folder in folders}, code_versions())
    with _connection(address, num_cpus=max(1, min(num_workers, len(items)))):
        import ray

        num_workers = min(_num_workers(num_workers, num_gpus=num_gpus), len(items))
        try:
            if address.startswith(CLIENT):  # Ray Data does not run in a client: let it run on the cluster
                rows = _run_remotely(job, items, num_workers, num_gpus)
            else:
                rows = _run(job, items, num_workers, num_gpus)
            with contextlib.closing(rows):  # before Ray is shut down: what is left of it would end this process
                for index, result in rows:
                    if isinstance(result, WorkerFailure):
                        raise result.error
                    yield index, result
        except ray.exceptions.RayError as error:
            raise _explained(error) from error


def _run(job: Job, items: Sequence[tuple[int, Any]], num_workers: int, num_gpus: float) -> Iterator[tuple[int, Any]]:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    rows = [{"index": index, "item": pickle.dumps(item)} for index, item in items]
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        # Only so can the attempts be limited; Ray's default is no limit, and an item that kills its worker would go on.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            RayWorker,
            fn_constructor_args=(job,),
            num_cpus=1,
            num_gpus=num_gpus,
            compute=ray.data.ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=1),
            max_restarts=_MAX_ATTEMPTS - 1,
            max_task_retries=_MAX_ATTEMPTS - 1,
        )
        with contextlib.closing(iter(dataset.iter_rows())) as results:
            for row in results:
                yield row["index"], pickle.loads(row["result"])


def _run_remotely(*arguments: Any) -> Iterator[tuple[int, Any]]:
    import ray

    stream = ray.remote(num_cpus=0)(_Stream).remote(*arguments)
    while (row := ray.get(stream.next.remote())) is not None:
        yield row


class _Stream:
    """`_run` as an actor."""

    def __init__(self, *arguments: Any) -> None:
        self.rows = _run(*arguments)

    def next(self) -> tuple[int, Any] | None:
        return next(self.rows, None)


def _num_workers(wanted: int, *, num_gpus: float) -> int:
    import ray

    resources = ray.cluster_resources()
    if num_gpus:
        possible = int(resources.get("GPU", 0) / num_gpus)
        if not possible:
            raise PokegemmaError(f"the Ray cluster has {resources.get('GPU', 0):g} GPUs, a worker needs {num_gpus:g}")
    else:
        possible = int(resources.get("CPU", 0))
    return max(1, min(wanted or possible, possible))


def _explained(error: Exception) -> Exception:
    """Return an error of Ray as one line, where it is not a bug in our code."""
    import ray

    text = str(error)
    if "No module named 'pokegemma'" in text:
        return PokegemmaError("a Ray worker cannot import pokegemma: install it in the Python of every machine")
    if isinstance(error, ray.exceptions.RayTaskError):  # raised in our code: show its traceback
        return error
    return PokegemmaError(f"a Ray worker died {_MAX_ATTEMPTS} times (out of memory?): {' '.join(text.split())[:200]}")


@contextlib.contextmanager
def _connection(address: str, *, num_cpus: int) -> Iterator[None]:
    """Connect to Ray, or start it, quietly."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise PokegemmaError(
            f"--ray_address needs Ray Data ({error}): ./init.sh --with ray, or pip install 'pokegemma[ray]'"
        ) from error
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {}
        if address == LOCAL:
            # Not below TMPDIR: the path of a socket has 103 characters at most.
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
            )
            options = {
                "num_cpus": num_cpus,
                "include_dashboard": False,
                "_temp_dir": folder,
                "object_store_memory": _OBJECT_STORE_BYTES,
            }
        elif address != AUTO:
            _check_reachable(address)
        stack.callback(ray.shutdown)
        stack.callback(_join_executors)
        with _kept_sigterm():
            _connect(
                lambda: ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options), address
            )
        yield


def _connect(connect: Callable[[], object], address: str) -> None:
    """Call `connect`, again where the server of a Ray client did not start.

    Ray forks that server from a process with many threads; now and then the fork dies before it starts the server
    (https://github.com/ray-project/ray/issues/63202). The client then gets a ConnectionAbortedError after 30 s.

    Raises:
        PokegemmaError: it failed; with the last line of Ray's traceback, which names the cause.
    """
    for left in reversed(range(_MAX_CONNECTS)):
        try:
            connect()
            return
        except ConnectionAbortedError as error:
            cause = str(error).strip().rpartition("\n")[2].strip()
            if not left:
                raise PokegemmaError(
                    f"--ray_address {address}: the cluster did not start a server for this client, "
                    f"{_MAX_CONNECTS} times: {cause}; see the logs of the head node, and start the cluster with "
                    "GRPC_ENABLE_FORK_SUPPORT=0 (https://github.com/ray-project/ray/issues/63202)"
                ) from error
            logger.warning("%s: %s; connecting again (at most %d times)", address, cause, left)
        except (OSError, ValueError, RuntimeError) as error:
            raise PokegemmaError(
                f"--ray_address {address}: {' '.join(str(error).split())[:200]} (for a cluster with a token set "
                "RAY_AUTH_MODE=token, see Ray's documentation)"
            ) from error


def _join_executors() -> None:
    """Wait until Ray Data's threads have ended, which it does itself for 2 s only.

    One that calls Ray after the shutdown starts another Ray, or ends this process.
    """
    for thread in threading.enumerate():
        if thread.name.startswith(_EXECUTOR_THREAD):
            thread.join(_EXECUTOR_TIMEOUT_S)


def _check_reachable(address: str) -> None:
    """Refuse an address that does not answer: Ray would try for two minutes, and end this process."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise PokegemmaError(
            f'--ray_address {address}: {error}; give "local", "auto", host:port or ray://host:port'
        ) from error


@contextlib.contextmanager
def _kept_sigterm() -> Iterator[None]:
    """Put back the handler that `ray.init` replaces: `cli.run` lets SIGTERM unwind like an error."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
