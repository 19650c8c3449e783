"""Record play as an Eevee v1 session that no crash can spoil: each turn is a picture and one synced line.

A file is safe from a crash of the program once it is written, and from a power failure once it is synced, which takes 4
to 15 ms a turn. So a thread syncs the last turn and writes the screen of the next while the player decides. The line of
a turn is written after both.
"""

import errno
import json
import os
import types
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from pokegemma.data.eevee_v1.journals import JOURNAL_FILE, read_journal
from pokegemma.data.eevee_v1.named_pictures import SESSION_FILE
from pokegemma.data.eevee_v1.sessions import read_record
from pokegemma.data.frame_pictures import to_rgb
from pokegemma.data.png import encode_png
from pokegemma.data.prompts import BUTTONS
from pokegemma.data.recordings.corrections import Correction, is_blind, is_labeller
from pokegemma.errors import PokegemmaError
from pokegemma.outputs import file_lock, write_synced


@dataclass(frozen=True)
class PlayedTurn:
    """One turn of play, as it is recorded.

    Attributes:
        number: from 1; each turn has the number after the one before.
        time: when the screen was taken.
        button: what the player chose.
        pressed: what was pressed, which noise or a way out of a loop may have replaced; empty if pressing failed.
        probabilities: of `prompts.BUTTONS` in their order, or None.
        reasoning, situation: of the player's answer.
        decided_by: who chose what was pressed: one of `corrections.LABELLERS` or `corrections.BLIND_PLAYERS`, as it is
            or with a name, such as "model:outputs/merged". A blind turn is a sample only if it has a correction.
        correction: the right button, where somebody has already said so.
        new_start: the turn continues no earlier one (a loaded state): its window and earlier buttons begin here.
    """

    number: int
    time: datetime
    button: str
    pressed: Sequence[str]
    probabilities: Sequence[float] | None
    reasoning: str
    situation: str
    decided_by: str
    correction: Correction | None = field(default=None)
    new_start: bool = False

    def __post_init__(self) -> None:
        for button in (self.button, *self.pressed):
            if button not in BUTTONS:
                raise ValueError(f"turn {self.number}: button {button!r} is not one of {', '.join(BUTTONS)}")
        if not is_labeller(self.decided_by) and not is_blind(self.decided_by):
            raise ValueError(f"turn {self.number}: decided_by {self.decided_by!r} is unknown")


class SessionJournal:
    """A session folder that grows by one turn at a time; a killed process loses the turn in flight at most.

        with SessionJournal(folder, goal="leave the house", facts={"emulator": emulator.name}) as journal:
            journal.begin(screen)
            journal.record(PlayedTurn(journal.num_turns + 1, ...))

    A folder that already contains a journal is continued: its next turn follows the last whole one, and is marked as a
    new start. One process at a time may do so. session_data.json is written when the number of turns has doubled, and
    at the end; the converter reads later turns from the journal.

    Args:
        folder: the session's, such as runs/session_20261129_190000; its name is the session's id.
        facts: what decided what was seen and pressed (emulator, PressTiming, player, model, noise, seed), as JSON.

    Raises:
        PokegemmaError: the folder contains another program's session, or one with another goal, or another process
            records into it.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, goal: str, facts: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._pictures = self.folder / "sshots"
        self._path = self.folder / JOURNAL_FILE
        if (self.folder / SESSION_FILE).exists() and not self._path.exists():
            raise PokegemmaError(f"{folder} contains a session without a journal; choose another folder")
        self._pictures.mkdir(parents=True, exist_ok=True)
        self._open = ExitStack()
        self._work: Future[None] | None = None
        self._begun: Path | None = None  # the screen of a turn that is not recorded yet
        self._unsynced: Path | None = None  # the screen of the last turn
        try:
            self._file = self._open.enter_context(file_lock(self._path, wait=False))
        except BlockingIOError:
            raise PokegemmaError(f"{folder} is being recorded by another process") from None
        self._thread = self._open.enter_context(ThreadPoolExecutor(1, thread_name_prefix="journal"))
        with ExitStack() as on_error:
            on_error.callback(self._open.close)
            self.num_turns = self._resume(goal, dict(facts))
            on_error.pop_all()
        self._was_resumed = self.num_turns > 0

    def begin(self, picture: Image.Image) -> None:
        """Start to sync the last turn, and to write the screen of the next; `record` makes it part of the session."""
        self._wait()
        self._begun = self._pictures / f"step_{self.num_turns + 1:04d}_grid.png"
        self._work = self._thread.submit(self._sync_and_write, self._begun, picture)

    def record(self, turn: PlayedTurn) -> None:
        """Add the turn that was begun. Screen and line are written when this returns, and synced during the next.

        Raises:
            ValueError: the turn's number does not follow the last one's.
            OSError: the disk is full or cannot be written, now or when the turn before was synced; the turn is not
                part of the session.
        """
        if turn.number != self.num_turns + 1:
            raise ValueError(f"turn {turn.number} does not follow turn {self.num_turns}")
        assert self._begun is not None
        self._wait()
        self._write_line(_turn_record(turn, new_start=turn.new_start or self._was_resumed))
        self._was_resumed = False
        self.num_turns = turn.number
        self._unsynced, self._begun = self._begun, None

    def close(self, status: str = "done") -> None:
        """Write session_data.json and let other processes record; closing twice does nothing.

        Args:
            status: in the session's metadata: why recording ended.
        """
        with self._open:
            if not self._file.closed:
                self._wait()
                if self._unsynced is not None:
                    self._sync(self._unsynced)
                if self._begun is not None:
                    self._begun.unlink(missing_ok=True)  # its turn did not end
                self._write_session(status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close("done" if error is None else "stopped")

    def _resume(self, goal: str, facts: dict[str, Any]) -> int:
        """Cut off half a line, and write where recording starts; return the number of the last turn."""
        journal = read_journal(self._path)
        os.ftruncate(self._file.fileno(), journal.num_bytes)
        now = datetime.now().isoformat(timespec="seconds")
        if not journal.head:
            if journal.turns:
                raise PokegemmaError(f"{self._path} is not the journal of a session; choose another folder")
            name = self.folder.resolve().name.removeprefix("session_")
            head = {"session_id": name, "goal": goal, "start_time": now, "facts": facts}
            self._write_line({"session": head})
            self._write_session("running")
            return 0
        if journal.head["goal"] != goal:
            raise PokegemmaError(
                f"{self.folder} has the goal {journal.head['goal']!r}, not {goal!r}; choose another folder"
            )
        num_turns = max((turn["turn"] for turn in journal.turns if turn is not None), default=0)
        self._write_line({"resumed": {"turn": num_turns + 1, "time": now, "facts": facts}})
        return num_turns

    def _write_line(self, record: dict[str, Any]) -> None:
        """Append a line to the journal; one that does not fit is removed again."""
        line, descriptor = json.dumps(record).encode() + b"\n", self._file.fileno()
        size = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(descriptor, size)
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def _wait(self) -> None:
        """Wait for the thread; raises what failed there."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def _sync_and_write(self, path: Path, picture: Image.Image) -> None:
        if self._unsynced is not None:
            self._sync(self._unsynced)
            if self.num_turns & (self.num_turns - 1) == 0:
                self._write_session("running")
        path.write_bytes(encode_png(np.asarray(to_rgb(picture))))

    def _sync(self, picture: Path) -> None:
        """Wait until the last turn is on the disk."""
        self._unsynced = None
        try:
            with open(picture, "rb") as file:
                os.fsync(file.fileno())
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(picture)) from error

    def _write_session(self, status: str) -> None:
        """Write session_data.json from what it already contains (it may have been corrected) and the journal."""
        record, _ = read_record(self.folder)
        turns = record["turns"]
        counts = {"status": status, "total_turns": len(turns), "successful_turns": len(turns)}
        record["session_metadata"] = record["session_metadata"] | counts
        write_synced(self.folder / SESSION_FILE, json.dumps(record, indent=2).encode() + b"\n")


def new_session_folder(runs: Path) -> Path:
    """Return the path of a new session in `runs`, named after the time as Eevee v1 did; it does not exist."""
    name = f"session_{datetime.now():%Y%m%d_%H%M%S}"
    paths = (Path(runs) / f"{name}{ending}" for ending in ("", *(f"_{number}" for number in range(2, 1000))))
    return next(path for path in paths if not path.exists())


def _turn_record(turn: PlayedTurn, *, new_start: bool) -> dict[str, Any]:
    """Return a turn in Eevee v1's format; what v1 did not know follows its keys."""
    time, probabilities = turn.time.isoformat(), None
    if turn.probabilities is not None:
        probabilities = {name: round(float(value), 4) for name, value in zip(BUTTONS, turn.probabilities, strict=True)}
    parsed = {
        "button_presses": [turn.button],
        "reasoning": turn.reasoning,
        "context_detected": turn.situation,
        "confidence": probabilities and probabilities[turn.button],
    }
    record = {
        "turn": turn.number,
        "timestamp": time,
        "ai_analysis": {"parsed_json": parsed, "raw_text": "", "parsing_success": True},
        "button_presses": list(turn.pressed),
        "action_result": bool(turn.pressed),
        "screenshot_path": f"screenshot_{turn.number}.png",
        "execution_time": time,
        "template_used": None,
        "template_version": None,
        "visual_analysis": None,
        "strategic_context": None,
        "memory_context": None,
        "decided_by": turn.decided_by,
    }
    if probabilities is not None:
        record["probabilities"] = probabilities
    if turn.correction is not None:
        record["correction"] = turn.correction.to_record()
    if new_start:
        record["new_start"] = True
    return record
