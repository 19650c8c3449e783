"""Options of scripts/play.py."""

from dataclasses import dataclass
from typing import Literal

from pokegemma.data.prompts import Layout
from pokegemma.errors import PokegemmaError, check_ranges
from pokegemma.options import option
from pokegemma.play.emulators.emulator import PressTiming
from pokegemma.play.players import Decide
from pokegemma.play.stuck import STUCK_DEFAULT


@dataclass
class PlayOptions:
    """What plays which game, and what is kept of it."""

    model_path: str | None = option(
        None,
        "Checkpoint folder or Hugging Face id, or an adapter's folder. With --server: the folder that is "
        "served, whose run.json tells layout and frames.",
    )
    server: str | None = option(None, "OpenAI-compatible server, without /v1: http://127.0.0.1:8000.")
    player: Literal["model", "expert", "random", "repeat"] = option(
        "model", "expert knows the toy game's rooms; random and repeat see no screen."
    )
    game: str = option("toy", "toy, a ROM of your own (.gba, .gb, .gbc), or the http URL of SkyEmu's control server.")
    goal: str | None = option(None, "What the player is told. Default: the toy room's own, else none.")
    max_turns: int = option(300, "Stop after this many turns.")
    layout: Layout | None = option(None, "How turns are shown. Default: that of the model's run.json, else grid.")
    num_frames: int | None = option(None, "Frames that a decision shows. Default: as in training, else 4.")
    max_gap_s: float | None = option(
        None, "After a longer pause the window of frames begins anew. Default: as in training, else 30."
    )
    decide: Decide = option(
        "scored", "scored: the eight buttons are scored in one pass; generate: the model writes its reason."
    )
    temperature: float = option(0.0, "0: the likeliest button; above: drawn.")
    stuck: int = option(STUCK_DEFAULT, "Same screen and same button this often: draw another button. 0: never.")
    noise: float = option(0.0, "Fraction of presses that are replaced at random.")
    record: str | None = option(None, "Folder in which to record the session, for the converter; with replay.html.")
    resume: str | None = option(None, "Session folder to continue, from its last saved state of the game.")
    save_every: int = option(50, "With --record: save the game's state every so many turns.")
    load_state: str | None = option(None, "Start from this saved state of the game.")
    correct: bool = option(False, "Toy game: record the expert's button as a correction where another was pressed.")
    seed: int = option(0, "Of the toy game's room, and of everything drawn at random.")
    level: int = option(1, "Level of the toy game.")
    hold: int = option(PressTiming.hold_frames, "Frames (1/60 s) that a button is held.")
    still: int = option(
        PressTiming.still_frames, "After a press, wait until the picture was the same this many frames."
    )
    wait: int = option(PressTiming.max_wait_frames, "Longest wait after a press, in frames.")
    server_model: str | None = option(
        None, "Name of the model in requests; default: the only one that the server lists."
    )
    api_key_variable: str | None = option(None, "Environment variable that holds the server's API key.")
    image_size: int | None = option(
        None, "With --server: side of the pictures sent. Default: of --model_path's run.json, else 896."
    )
    timeout_s: float = option(60.0, "Longest wait for a server's answer.")
    max_new_tokens: int = option(256, "Largest number of tokens in a written answer.")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "auto: bfloat16 on a GPU that supports it, else float32."
    )
    device: str | None = option(None, "cuda, cuda:1, mps or cpu. Default: the best device of this machine.")
    quiet: bool = option(False, "Show no turns while playing.")
    json: bool = option(False, "Print the summary as JSON.")

    def __post_init__(self) -> None:
        check_ranges(self, "max_turns", "save_every", "num_frames", "max_new_tokens", "image_size", at_least=1)
        check_ranges(self, "hold", "still", "wait", at_least=1)
        check_ranges(self, "wait", at_least=self.still)
        check_ranges(self, "stuck", "temperature", at_least=0)
        check_ranges(self, "noise", at_least=0, at_most=1)
        check_ranges(self, "timeout_s", "max_gap_s", above=0)
        if self.player == "model" and self.model_path is None and self.server is None:
            raise PokegemmaError("give --model_path or --server, or --player expert, random or repeat")
        if self.resume is not None and (self.record is not None or self.load_state is not None):
            raise PokegemmaError("--resume continues its own session and state: leave out --record and --load_state")
        if (self.correct or self.player == "expert") and self.game != "toy":
            raise PokegemmaError(f"--game {self.game}: only the toy game in Python has an expert")

    @property
    def timing(self) -> PressTiming:
        """How buttons are pressed."""
        return PressTiming(hold_frames=self.hold, still_frames=self.still, max_wait_frames=self.wait)
