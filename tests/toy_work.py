"""Work for the tests of workers, in a module that every process can import."""

import itertools
import os
import shutil

from pokegemma.errors import CheckFailedError, PokegemmaError
from tests.processes import wait_until


def empty_folder(path):
    """Make a folder for notes, and return it. A process that is tried again must not find those of the dead one."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def count_calls():
    return {"process": os.getpid(), "calls": itertools.count(1)}


def use_state(item, state, *, folder, num_workers):
    """Return which process did what, once all workers have an item: a fast one would leave none to a late one."""
    (folder / str(os.getpid())).touch()
    wait_until(lambda: len(list(folder.iterdir())) >= num_workers)
    return item, state["process"], next(state["calls"]), os.getpid()


def note_ray_worker(item, state, *, work, folder, num_workers=2):
    """Do a piece of work, and leave a file with the Ray actor that did it in `folder`, named after its process.

    The first piece of each worker waits until all have one: a fast worker would leave none to a late one.
    """
    import ray

    (folder / str(os.getpid())).write_text(str(ray.get_runtime_context().get_actor_id()))
    wait_until(lambda: len(list(folder.iterdir())) >= num_workers)
    return work(item, state)


def assert_done_by_ray(workers, *, num_workers):
    """Check what `note_ray_worker` left: so many processes, none of them this one, each an actor of Ray."""
    actors = {int(path.name): path.read_text() for path in workers.iterdir()}
    assert len(actors) == num_workers and os.getpid() not in actors
    assert len(set(actors.values())) == num_workers and "None" not in actors.values()


def fail_at_three(item, _):
    if item == 3:
        raise CheckFailedError("item 3: broken")
    return item


def fail_to_start():
    raise PokegemmaError("model not found")


def divide(item, _):
    return 1 / item


def die(item, _):
    os._exit(1)
