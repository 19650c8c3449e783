"""Record the toy game's expert as Eevee v1 sessions, with the gaps that real recordings have."""

import base64
import io
import json
import random
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from pokegemma.play.noise import replace_press
from pokegemma.play.toy.world import ToyWorld

_FIRST_START = datetime(2025, 1, 6, 8, 0)
_TURN_S = 3
_SEED_SPACING = timedelta(days=10)
_SESSION_SPACING = timedelta(minutes=5)
_FAILED_FRACTION = 0.015
_PATHFINDING_FRACTION = 0.015
_MAX_PATHFINDING_MOVES = 6
_RAW_FRAMES_EVERY = 4
"""Every fourth session also has its frames as base64, in `enhanced_turns`."""

_REASONS = {"a": "a sign to read", "start": "the bell rings", "b": "the text is read", "select": "the menu was seen"}
_CONFIDENCES = ("high", "high", "medium")


def record_sessions(
    output_dir: Path, *, num_sessions: int, seed: int, num_turns: int = 25, level: int = 1, noise: float = 0.0
) -> list[list[str]]:
    """Write `output_dir`/runs/session_*/ as Eevee v1 did, each of `num_turns` turns; a done room leads to the next.

    About 3 % of the turns have no decision: failed answers, for which "b" was pressed, and pathfinding turns.

    Args:
        noise: share of the presses that are replaced by another button (DART, arXiv:1703.09327). Such a turn has the
            expert's button as its correction, which is the label, and what was pressed in `button_presses`.

    Returns:
        The expert's buttons of each session, oldest first, turns without a decision left out.
    """
    decisions = []
    for index in range(num_sessions):
        start = _FIRST_START + seed * _SEED_SPACING + index * max(_SESSION_SPACING, timedelta(seconds=4 * num_turns))
        session_dir = Path(output_dir) / "runs" / f"session_{start:%Y%m%d_%H%M%S}"
        keep_raw_frames = index % _RAW_FRAMES_EVERY == _RAW_FRAMES_EVERY - 1
        recorder = _SessionRecorder(
            session_dir,
            name=f"{seed}/{index}",
            start=start,
            level=level,
            noise=noise,
            keep_raw_frames=keep_raw_frames,
        )
        decisions.append(recorder.record(num_turns))
    return decisions


def blind_accuracies(decisions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return how often a guess without a picture is right: always the same, the previous, the likeliest after it.

    Fitted on the very `decisions` it is scored on, so no such guesser does better elsewhere. The first turn of a
    session has no previous button: a miss for `repeat_previous`, a state of its own for `markov`.
    """
    pairs = Counter(pair for buttons in decisions for pair in zip([None, *buttons], buttons, strict=False))
    total = sum(pairs.values())
    shares: Counter[str] = Counter()
    best_after: dict[str | None, int] = {}
    for (previous, button), count in pairs.items():
        shares[button] += count
        best_after[previous] = max(best_after.get(previous, 0), count)
    return {
        "majority": max(shares.values()) / total,
        "repeat_previous": sum(count for (previous, button), count in pairs.items() if previous == button) / total,
        "markov": sum(best_after.values()) / total,
    }


def explain(button: str, *, situation: str) -> str:
    """Return the reason for the expert's button."""
    guide = "the arrow points" if situation == "off_trail" else "the path leads"
    return _REASONS.get(button) or f"{guide} {button}"


class _SessionRecorder:
    """One session while it is recorded: the world it is in, and the turns so far."""

    def __init__(
        self, session_dir: Path, *, name: str, start: datetime, level: int, noise: float, keep_raw_frames: bool
    ):
        self._dir, self._name, self._start, self._level, self._noise = session_dir, name, start, level, noise
        self._keep_raw_frames = keep_raw_frames
        self._rng = random.Random(f"toy session {name}")
        self._noise_rng = random.Random(f"toy noise {name}")
        self._num_rooms = 0
        self._world = self._next_room()
        self._goal = self._world.goal
        self._turns: list[dict[str, Any]] = []
        self._enhanced_turns: list[dict[str, Any]] = []
        self._decisions: list[str] = []

    def record(self, num_turns: int) -> list[str]:
        """Play and write the session; return the expert's decisions."""
        (self._dir / "sshots").mkdir(parents=True)
        for turn in range(1, num_turns + 1):
            self._record_turn(turn)
        session_id, start = self._dir.name.removeprefix("session_"), self._start.isoformat()
        head = {"session_id": session_id, "goal": self._goal, "start_time": start}
        counts = {
            "status": "running",
            "total_turns": num_turns,
            "successful_turns": sum(turn["ai_analysis"]["parsing_success"] for turn in self._turns),
            "fine_tuning_eligible": True,
        }
        session = {
            "session_metadata": head | counts,
            **head,
            "turns": self._turns,
            "enhanced_turns": self._enhanced_turns,
        }
        (self._dir / "session_data.json").write_text(json.dumps(session, indent=2) + "\n", encoding="utf-8")
        return self._decisions

    def _next_room(self) -> ToyWorld:
        # Text seeds: no room of a recording is ever the room of a whole-number seed, which closed-loop play uses.
        self._num_rooms += 1
        return ToyWorld(f"{self._name}/{self._num_rooms}", level=self._level)

    def _record_turn(self, turn: int) -> None:
        if self._world.is_done:
            self._world = self._next_room()
        situation, picture = self._world.situation, _encode_png(self._world.render())
        chance, correction = self._rng.random(), {}
        if chance < _FAILED_FRACTION:
            buttons, analysis = ["b"], self._fail()
        elif chance < _FAILED_FRACTION + _PATHFINDING_FRACTION and situation == "navigation":
            buttons, analysis = [], self._find_path()
        else:
            buttons, analysis, correction = self._decide()
        (self._dir / "sshots" / f"step_{turn:04d}_grid.png").write_bytes(picture)
        visual = {"scene_type": situation, "confidence": "high"}
        # v1 wrote the vision model's answer twice: as it came, and the JSON found in it.
        bare = json.dumps(visual, indent=2)
        (self._dir / f"step_{turn:04d}_visual_analysis.txt").write_text(
            f"```json\n{bare}\n```\n\n{bare}\n", encoding="utf-8"
        )
        logged = self._start + timedelta(seconds=_TURN_S * turn)
        self._turns.append(
            {
                "turn": turn,
                "timestamp": logged.isoformat(),
                "ai_analysis": analysis,
                "button_presses": buttons,
                "action_result": True,
                "screenshot_path": f"screenshot_{turn}.png",
                "execution_time": (logged - timedelta(milliseconds=400)).isoformat(),
                "template_used": "exploration_strategy",
                "template_version": "6.4",
                "visual_analysis": visual,
                "strategic_context": "",
                "memory_context": None,
                **correction,
            }
        )
        if self._keep_raw_frames:
            self._enhanced_turns.append(
                {
                    "turn_number": turn,
                    "screenshot_base64": base64.b64encode(picture).decode("ascii"),
                    "final_button_presses": buttons,
                    "turn_success": True,
                    "session_goal": self._goal,
                }
            )

    def _decide(self) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
        """Press the expert's button or, by chance, another; return what was pressed, the answer, and the correction."""
        situation, button = self._world.situation, self._world.expert_button()
        parsed = {
            "button_presses": [button],
            "reasoning": explain(button, situation=situation),
            "observations": f"a {situation} screen",
            "context_detected": situation,
            "confidence": self._rng.choice(_CONFIDENCES),
        }
        self._decisions.append(button)
        pressed = replace_press(button, noise=self._noise, rng=self._noise_rng)
        self._world.press(pressed)
        correction = {} if pressed == button else {"correction": {"button": button, "by": "expert"}}
        return [pressed], _analysis(parsed), correction

    def _find_path(self) -> dict[str, Any]:
        """Walk several moves at once, as v1's pathfinding did: only the frame before them is recorded."""
        for _ in range(self._rng.randint(2, _MAX_PATHFINDING_MOVES)):
            if self._world.situation == "navigation":
                self._world.press(self._world.expert_button())
        parsed = {
            "pathfinding_action": "navigate_to",
            "target_x": self._rng.randint(0, 7),
            "target_y": self._rng.randint(0, 7),
            "reasoning": "the path is long",
            "confidence": "medium",
        }
        return _analysis(parsed)

    def _fail(self) -> dict[str, Any]:
        """Press v1's fallback "b", after an answer without JSON or no answer at all."""
        self._world.press("b")
        raw_text = self._rng.choice(("I would follow the path.", "API Error: the request timed out"))
        return {
            "parsed_json": None,
            "raw_text": raw_text,
            "parsing_success": False,
            "error": "No JSON block found",
        }


def _analysis(parsed: dict[str, Any]) -> dict[str, Any]:
    raw_text = f"```json\n{json.dumps(parsed)}\n```"
    return {"parsed_json": parsed, "raw_text": raw_text, "parsing_success": True}


def _encode_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
