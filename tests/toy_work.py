"""Work for the tests of workers, in a module that every process can import."""

import itertools
import os
import time

from pokegemma.errors import CheckFailedError, PokegemmaError


def count_calls():
    return {"process": os.getpid(), "calls": itertools.count(1)}


def use_state(item, state):
    time.sleep(0.1)
    return item, state["process"], next(state["calls"]), os.getpid()


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
