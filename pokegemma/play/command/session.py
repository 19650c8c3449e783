"""Play one session as the options ask: open the game, play, record, and summarise."""

import contextlib
import logging
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pokegemma.data.eevee_v1.journals import JOURNAL_FILE, read_journal
from pokegemma.data.recordings.readers import EEVEE_V1, Recording
from pokegemma.errors import PokegemmaError
from pokegemma.outputs import write_synced
from pokegemma.play.command.live_view import LiveView
from pokegemma.play.command.options import PlayOptions
from pokegemma.play.emulators.emulator import Emulator
from pokegemma.play.emulators.open import open_emulator
from pokegemma.play.emulators.toy import ToyEmulator
from pokegemma.play.loop import STAGES, PlayResult, play
from pokegemma.play.players import ButtonPlayer, ExpertPlayer, RandomPlayer, RepeatPlayer
from pokegemma.play.recording.journal import PlayedTurn, SessionJournal, new_session_folder
from pokegemma.play.replay.pages import REPLAY_FILE, write_replay
from pokegemma.tables import format_table

logger = logging.getLogger(__name__)

STATE_FILE = "emulator_state.bin"
"""In the session's folder: what `Emulator.save` returned."""


@dataclass(frozen=True)
class PlaySummary:
    """What scripts/play.py reports.

    Attributes:
        result: turns and times; see `PlayResult`.
        session: the folder of the recorded session, None without recording.
    """

    result: PlayResult
    session: Path | None

    def to_record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "ended": self.result.ended,
            "num_turns": len(self.result.turns),
            "buttons": self.result.buttons,
            "latency_ms": stage_latencies(self.result),
            "session": self.session and str(self.session),
        }


def play_session(options: PlayOptions) -> PlaySummary:
    """Play until the game is over, `max_turns` or Ctrl-C.

    Raises:
        PokegemmaError: game, player or recording cannot be used, or fail. Turns that were played stay recorded.
    """
    with contextlib.ExitStack() as stack:
        emulator = open_emulator(options.game, timing=options.timing, seed=options.seed, level=options.level)
        stack.callback(emulator.close)
        folder = _session_folder(options)
        _load_state(emulator, options)
        world = emulator.world if isinstance(emulator, ToyEmulator) else None
        goal = options.goal or (world and world.goal) or _recorded_goal(options)
        player = make_player(options, emulator)
        callbacks: list[Callable[[PlayedTurn, Image.Image], None]] = []
        journal = None
        if folder is not None:
            journal = _open_journal(folder, goal=goal or "", facts=session_facts(options, emulator, player))
            stack.callback(_write_replay, folder)  # after the journal is closed
            stack.enter_context(journal)
            callbacks.append(_StateKeeper(emulator, folder, options.save_every).after_turn)
        if not options.quiet:
            callbacks.append(LiveView(sys.stderr).show)
        result = play(
            emulator,
            player,
            goal=goal,
            max_turns=options.max_turns,
            journal=journal,
            stuck=options.stuck or None,
            noise=options.noise,
            rng=random.Random(f"play {options.seed}"),
            expert=world.expert_button if world and options.correct else None,
            is_done=(lambda: emulator.world.is_done) if world else lambda: False,
            on_turn=lambda turn, screen: [call(turn, screen) for call in callbacks],
            stop_on_interrupt=True,
        )
        if journal is not None and result.turns:
            write_synced(folder / STATE_FILE, emulator.save())
            journal.close(result.ended)
    return PlaySummary(result, folder)


def make_player(options: PlayOptions, emulator: Emulator) -> ButtonPlayer:
    """Return the player of the options.

    Raises:
        PokegemmaError: a model cannot be loaded.
    """
    if options.player == "expert":
        assert isinstance(emulator, ToyEmulator)
        return ExpertPlayer(emulator.world)
    if options.player != "model":
        return {"random": RandomPlayer, "repeat": RepeatPlayer}[options.player](options.seed)
    from pokegemma.play.command.loading import load_model_player  # imports torch

    return load_model_player(options)


def session_facts(options: PlayOptions, emulator: Emulator, player: ButtonPlayer) -> dict[str, Any]:
    """Return what decided what was seen and pressed, for the session's record."""
    names = ("game", "decide", "temperature", "stuck", "noise", "seed", "level")
    history = getattr(player, "history", None)  # of models
    return {
        "emulator": emulator.name,
        "press_timing": asdict(options.timing),
        "player": player.name,
        "view": None if history is None else asdict(history.view),
        **{name: getattr(options, name) for name in names},
    }


def _session_folder(options: PlayOptions) -> Path | None:
    if options.resume is None:
        return None if options.record is None else new_session_folder(Path(options.record))
    folder = Path(options.resume)
    if not (folder / JOURNAL_FILE).is_file():
        raise PokegemmaError(f"--resume {folder}: not a session that scripts/play.py recorded")
    return folder


def _open_journal(folder: Path, *, goal: str, facts: dict[str, Any]) -> SessionJournal:
    try:
        return SessionJournal(folder, goal=goal, facts=facts)
    except OSError as error:
        raise PokegemmaError(f"--record: {folder} cannot be written: {error.strerror}") from error


def _recorded_goal(options: PlayOptions) -> str | None:
    """Return the goal of the session that is continued."""
    return options.resume and read_journal(Path(options.resume) / JOURNAL_FILE).head.get("goal")


def _load_state(emulator: Emulator, options: PlayOptions) -> None:
    """Load the state that the options name, if any.

    Raises:
        PokegemmaError: the file cannot be read, is damaged, or is not a state of this game.
    """
    path = options.load_state
    if options.resume is not None:
        path = Path(options.resume) / STATE_FILE
        if not path.exists():
            logger.warning("%s: no saved state of the game; it starts from its beginning", options.resume)
            return
    if path is not None:
        try:
            emulator.load(Path(path).read_bytes())
        except OSError as error:
            raise PokegemmaError(f"{path} cannot be read: {error.strerror}") from error
        except PokegemmaError as error:
            raise PokegemmaError(f"{path}: {error}") from error
        logger.info("%s: the game continues from this state", path)


class _StateKeeper:
    """Save the game's state every `save_every` turns of a session."""

    def __init__(self, emulator: Emulator, folder: Path, save_every: int) -> None:
        self._emulator, self._folder, self._save_every = emulator, folder, save_every

    def after_turn(self, turn: PlayedTurn, screen: Image.Image) -> None:
        if turn.number % self._save_every == 0:
            write_synced(self._folder / STATE_FILE, self._emulator.save())


def _write_replay(folder: Path) -> None:
    write_replay([Recording(folder, EEVEE_V1)], folder / REPLAY_FILE)


def stage_latencies(result: PlayResult) -> dict[str, dict[str, float]]:
    """Return the 50th and 95th percentile of each stage in milliseconds, and its share of the time."""
    total = sum(map(sum, result.seconds.values())) or 1.0
    latencies = {}
    for stage in STAGES:
        values = result.seconds[stage] or [0.0]
        p50, p95 = np.percentile(values, (50, 95)) * 1000
        latencies[stage] = {"p50": float(p50), "p95": float(p95), "share": sum(values) / total}
    return latencies


def format_summary_table(summary: PlaySummary) -> str:
    """Return the summary for a terminal."""
    result = summary.result
    rows = [("stage", "p50 ms", "p95 ms", "of the time")]
    for stage, value in stage_latencies(result).items():
        rows.append((stage, f"{value['p50']:.1f}", f"{value['p95']:.1f}", f"{value['share']:.0%}"))
    ends = {"done": "the game is over", "max_turns": "--max_turns", "interrupted": "Ctrl-C"}
    lines = [format_table(rows), f"{len(result.turns)} turns; ended: {ends[result.ended]}"]
    if summary.session is not None:
        lines.append(f"session: {summary.session}, replay: {summary.session / REPLAY_FILE}")
    return "\n".join(lines)
