"""Map a function over work items, in this process, in several, or on a Ray cluster: results in the items' order."""

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from pokegemma.errors import PokegemmaError
from pokegemma.parallel.ray_cluster import map_on_cluster

Item = TypeVar("Item")
Result = TypeVar("Result")

_cancelled: multiprocessing.synchronize.Event | None = None
_state: Any = None
_failure: PokegemmaError | OSError | None = None


def is_cancelled() -> bool:
    """Return, in a worker process, whether the result is no longer wanted."""
    return _cancelled is not None and _cancelled.is_set()


def map_items(
    function: Callable[[Item, Any], Result],
    items: Sequence[Item],
    *,
    num_workers: int,
    initialize: Callable[[], Any] | None = None,
    ray_address: str | None = None,
    num_gpus: float = 0,
    folders: Sequence[Path] = (),
    size: Callable[[Item], int] | None = None,
    label: str = "",
    unit: str = "item",
) -> Iterator[Result]:
    """Yield `function(item, state)` of each item, in the order of `items`, with a progress bar on stderr.

    Functions are module-level, items and results can be pickled. On a cluster the item of a worker that died is done
    again, so what `function` writes must be the same the second time.

    Args:
        num_workers: processes; 0 or 1 for none but this one; on a cluster 0 for as many as fit.
        initialize: makes the `state` (a loaded model) once in each worker; without it `state` is None.
        ray_address: "local", "auto", host:port or ray://host:port.
        num_gpus: of each worker on a cluster.
        folders: what every machine of a cluster must see; checked there.
        size: of an item; the largest are done first.

    Raises:
        PokegemmaError: as `function` raised it, or a worker died.
    """
    order = sorted(range(len(items)), key=lambda index: -size(items[index])) if size else range(len(items))
    indexed = [(index, items[index]) for index in order]
    if not indexed:
        return
    if ray_address:
        pairs = map_on_cluster(
            function,
            indexed,
            address=ray_address,
            num_workers=num_workers,
            initialize=initialize,
            folders=folders,
            num_gpus=num_gpus,
        )
    elif min(num_workers, len(items)) <= 1:
        pairs = _map_here(function, list(enumerate(items)), initialize=initialize)
    else:
        pairs = _map_in_processes(function, indexed, num_workers=num_workers, initialize=initialize)
    done: dict[int, Result] = {}
    next_index = 0
    with contextlib.closing(pairs), tqdm(total=len(items), desc=label or None, unit=unit) as progress:
        for index, result in pairs:
            done[index] = result
            progress.update()
            while next_index in done:
                yield done.pop(next_index)
                next_index += 1


def _map_here(
    function: Callable[[Item, Any], Result],
    items: Sequence[tuple[int, Item]],
    *,
    initialize: Callable[[], Any] | None,
) -> Iterator[tuple[int, Result]]:
    state = initialize() if initialize else None
    for index, item in items:
        yield index, function(item, state)


def _map_in_processes(
    function: Callable[[Item, Any], Result],
    items: Sequence[tuple[int, Item]],
    *,
    num_workers: int,
    initialize: Callable[[], Any] | None,
) -> Iterator[tuple[int, Result]]:
    cancelled = multiprocessing.Event()
    with concurrent.futures.ProcessPoolExecutor(
        min(num_workers, len(items)), initializer=_start_worker, initargs=(cancelled, initialize)
    ) as executor:
        futures = {executor.submit(_call, function, item): index for index, item in items}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise PokegemmaError("a worker process was killed (out of memory?); try --num_workers 1") from error
        except BaseException:
            cancelled.set()
            executor.shutdown(cancel_futures=True)  # waits: a worker still writing would keep the folder
            raise


def _call(function: Callable[[Item, Any], Result], item: Item) -> Result:
    if _failure is not None:
        raise _failure
    return function(item, _state)


def _start_worker(cancelled: multiprocessing.synchronize.Event, initialize: Callable[[], Any] | None) -> None:
    global _cancelled, _state, _failure
    _cancelled = cancelled
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which sets the event
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked worker would have the parent's handler
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        _state = initialize() if initialize else None
    except (
        PokegemmaError,
        OSError,
    ) as error:  # raised with the first item: the pool would only report that it is broken
        _failure = error


def _end_with_parent(parent_id: int) -> None:
    """End this worker soon after its parent was killed: an idle worker would wait for work for ever.

    A forked worker's sentinel stays open in its siblings, so the parent's id counts too (forkserver: its server's).
    """
    parent = multiprocessing.parent_process()
    while os.getppid() == parent_id and (parent is None or parent.is_alive()):
        time.sleep(0.5)
    os._exit(1)
