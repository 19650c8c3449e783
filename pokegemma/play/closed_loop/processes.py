"""Play rooms in several processes, where one process cannot play several: stable-retro runs one emulator in each."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from pokegemma.evaluation.predict import Predictor
from pokegemma.gemma.families import family_of
from pokegemma.parallel.workers import map_items
from pokegemma.play.cached_player import CachedPlayer
from pokegemma.play.closed_loop.episodes import Episode
from pokegemma.play.history import PlayView
from pokegemma.play.plain_player import PlainPlayer
from pokegemma.play.players import ButtonPlayer

Game = Callable[[ButtonPlayer], Episode]


def make_model_player(predictor: Predictor, view: PlayView) -> CachedPlayer | PlainPlayer:
    """Return a player of one game at a time."""
    return (PlainPlayer if family_of(predictor.model.config).inexact else CachedPlayer)(predictor, view)


def play_in_processes(
    games: Sequence[Game], view: PlayView, *, load: Callable[[], Predictor], num_workers: int, label: str
) -> list[Episode]:
    """Play games with a model that each process loads; return the episodes in the order of the games.

    Args:
        games, load: functions that can be pickled.

    Raises:
        PokegemmaError: the model cannot be loaded, or a process was killed.
    """
    start = partial(_start_player, load, view)
    return list(map_items(_play, games, num_workers=num_workers, initialize=start, label=label, unit="room"))


def _start_player(load: Callable[[], Predictor], view: PlayView) -> CachedPlayer | PlainPlayer:
    torch.set_num_threads(1)  # the processes share the cores; and a forked one waits for ever for OpenMP's threads
    return make_model_player(load(), view)


def _play(game: Game, player: ButtonPlayer) -> Episode:
    return game(player)
