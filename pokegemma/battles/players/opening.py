"""Open a player from what a command calls it: the name of a scripted one, or NAME=SOURCE.

A source is the name of a scripted player, or the folder of a policy (a checkpoint or adapter of scripts/sft_battles.py)
or an actor-critic (of scripts/rl_battles.py). FOLDER@TEMPERATURE draws actions by their probabilities, which are
flatter above a temperature of 1; without it the likeliest action is played. A source is also the URL of an
OpenAI-compatible server of a policy, without /v1, and with #words behind it where that reads metamon's 87 words; and
MODULE:CALLABLE, a policy in Python that takes metamon's observation.
"""

import functools
import hashlib
import multiprocessing
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pokegemma.battles.offline_rl.encoder_path import ADAPTER_FOLDER, SHAPE_FILE, find_encoder
from pokegemma.battles.players.metamon_player import hash_module, load_metamon_player
from pokegemma.battles.players.player import BattlePlayer
from pokegemma.battles.players.scripted import SCRIPTED_PLAYERS
from pokegemma.battles.policy.text_kind import DEFAULT_TEXT, TextKind
from pokegemma.errors import PokegemmaError, check_range
from pokegemma.release.measurements import read_json

_ADAPTER_FILE = "adapter_config.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
_TEMPERATURE = re.compile(r"[0-9]+(\.[0-9]+)?")
_CALLABLE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


@dataclass(frozen=True)
class PlayerSource:
    """A player that is not opened yet.

    Attributes:
        name: what reports and trajectory files call it.
        source: the name of a scripted player, a folder, a URL, or MODULE:CALLABLE.
        temperature: of a folder; 0 plays the likeliest action.

    Example:
        >>> PlayerSource.parse("teacher=heuristic")
        PlayerSource(name='teacher', source='heuristic', temperature=0.0)
        >>> PlayerSource.parse("new=outputs/policy@1.0")
        PlayerSource(name='new', source='outputs/policy', temperature=1.0)
    """

    name: str
    source: str
    temperature: float = 0.0

    @classmethod
    def parse(cls, text: str, *, flag: str = "--players") -> "PlayerSource":
        """Return the player that "heuristic" or "teacher=heuristic" stands for.

        Args:
            flag: the option, for errors.

        Raises:
            PokegemmaError: the name has characters that file names and Pokémon Showdown do not take, or there is no
                such player.
        """
        name, separator, source = text.partition("=")
        folder, at, temperature = source.rpartition("@")
        if at and _TEMPERATURE.fullmatch(temperature):
            player = cls(name, folder, float(temperature))
        else:
            player = cls(name, source if separator else name)
        if not _NAME.fullmatch(player.name):
            raise PokegemmaError(f"{flag} {text}: the name must be letters, digits, '.', '+' and '-'")
        if not (player.is_scripted or player.is_served or player.is_callable or player.folder.is_dir()):
            raise PokegemmaError(
                f"{flag} {text}: {player.source!r} is not a player; take one of {', '.join(SCRIPTED_PLAYERS)}, "
                "NAME=FOLDER of a policy, NAME=URL of a server, or NAME=MODULE:CALLABLE"
            )
        if player.temperature and (player.is_scripted or player.is_served or player.is_callable):
            raise PokegemmaError(f"{flag} {text}: {player.source} has no temperature")
        check_range(f"{flag} {text}: temperature", player.temperature, at_most=100)
        if player.is_served and player.state_text not in get_args(TextKind):
            raise PokegemmaError(
                f"{flag} {text}: #{player.state_text} must be one of #{', #'.join(get_args(TextKind))}"
            )
        return player

    @property
    def text(self) -> str:
        """What `parse` returns this player for."""
        text = self.name if self.source == self.name else f"{self.name}={self.source}"
        return f"{text}@{self.temperature}" if self.temperature else text

    @property
    def is_scripted(self) -> bool:
        return self.source in SCRIPTED_PLAYERS

    @property
    def is_served(self) -> bool:
        return self.source.startswith(("http://", "https://"))

    @property
    def is_callable(self) -> bool:
        return _CALLABLE.fullmatch(self.source) is not None and not self.folder.is_dir()

    @property
    def folder(self) -> Path:
        """The folder of a policy or an actor-critic."""
        return Path(self.source)

    @property
    def state_text(self) -> str:
        """What a served policy reads."""
        return self.source.partition("#")[2] or DEFAULT_TEXT

    def open(self) -> BattlePlayer:
        """Return the player.

        Raises:
            PokegemmaError: the folder contains no policy, it cannot be loaded, or the server cannot be reached.
        """
        if self.is_scripted:
            return SCRIPTED_PLAYERS[self.source](self.name)
        if self.is_callable:
            return load_metamon_player(self.source, self.name)
        if self.is_served:
            from pokegemma.battles.players.served import ServedPlayer

            return ServedPlayer(self.name, self.source.partition("#")[0], text=self.state_text)
        import torch

        from pokegemma.battles.players.actor_critic_player import load_actor_critic_player
        from pokegemma.battles.players.policy_player import load_policy_player

        if multiprocessing.parent_process() is not None:
            torch.set_num_threads(1)  # there is a worker for each core
        load = load_actor_critic_player if (self.folder / SHAPE_FILE).is_file() else load_policy_player
        return load(self.folder, self.name, temperature=self.temperature)

    def fingerprint(self) -> str:
        """Return what tells this player from another one that had its name before: the weights of a policy.

        Which model a server has is not known from here: only its URL counts. Of a callable the file of its module does.

        Raises:
            PokegemmaError: there is no such module.
        """
        if self.is_scripted or self.is_served:
            return self.source
        if self.is_callable:
            return f"{self.source} {hash_module(self.source)}"
        return f"{self.temperature} {hash_weights_of(self.folder)}"


@functools.lru_cache(maxsize=64)
def open_once(player: PlayerSource) -> BattlePlayer:
    """Return a player, opened once in each process; raise as `PlayerSource.open`."""
    return player.open()


def hash_weights_of(folder: Path) -> str:
    """Return a hash of all weights that a folder's player plays with, those of an adapter's base and an encoder too."""
    digest = hashlib.sha256()
    for path in [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob(f"{ADAPTER_FOLDER}/*.safetensors"))]:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for needed in _find_needed(folder):
        if needed.is_dir():
            digest.update(hash_weights_of(needed).encode())
    return digest.hexdigest()


def _find_needed(folder: Path) -> Iterator[Path]:
    """Yield the folders, or Hub ids, of other models that a folder's player needs."""
    if (folder / SHAPE_FILE).is_file():
        yield Path(find_encoder(folder))
    if (folder / _ADAPTER_FILE).is_file() and (
        base := read_json(folder / _ADAPTER_FILE).get("base_model_name_or_path")
    ):
        yield Path(base)


def parse_players(texts: Sequence[str], *, flag: str) -> tuple[PlayerSource, ...]:
    """Return the players of a command in their order.

    Raises:
        PokegemmaError: as `PlayerSource.parse`, or two have one name.
    """
    players = tuple(PlayerSource.parse(text, flag=flag) for text in texts)
    names = [player.name for player in players]
    for name in names:
        if names.count(name) > 1:
            raise PokegemmaError(f"{flag}: two players are called {name!r}; write NAME=SOURCE")
    return players
