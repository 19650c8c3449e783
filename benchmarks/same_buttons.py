"""Play unseen rooms in Python, as ROMs in mGBA, and over SkyEmu's HTTP protocol, and compare the buttons.

    python benchmarks/same_buttons.py --model_path outputs/toy/merged

Needs stable-retro (./init.sh --with play). A stand-in of SkyEmu's control server runs the same ROM behind HTTP. A room
is solved if the player leaves it within three times the expert's turns.
"""

import json
import random
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":  # a script has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pokegemma import cli
from pokegemma.options import option
from pokegemma.play.command.loading import load_model_player
from pokegemma.play.command.options import PlayOptions
from pokegemma.play.emulators.emulator import Emulator, PressTiming
from pokegemma.play.emulators.open import open_emulator
from pokegemma.play.emulators.toy import ToyEmulator
from pokegemma.play.loop import PlayResult, play
from pokegemma.play.players import ButtonPlayer
from pokegemma.play.rom.build import build_rom
from pokegemma.play.toy.world import ToyWorld
from pokegemma.tables import format_table
from tests.play.skyemu_server import RomFrames, SkyEmuServer, SkyEmuState

GAMES = ("Python", "ROM in mGBA", "ROM over SkyEmu's HTTP")


@dataclass
class SameButtonsOptions:
    """Which model plays which rooms."""

    model_path: str = option("outputs/toy/merged", "the demonstration's model")
    num_rooms: int = option(100, "rooms of the seeds FIRST_SEED and on")
    first_seed: int = option(1000, "recordings never use rooms of whole numbers")
    level: int = option(1, "of the rooms")
    stuck: int = option(2, "as of scripts/play.py; 0: never")
    json: bool = option(False, "print the result as JSON")


@dataclass(frozen=True)
class RoomResult:
    """What was pressed in one room, and whether the player left it in time."""

    solved: bool
    buttons: tuple[str, ...]


def count_expert_turns(seed: int, level: int) -> int:
    """Return the turns that the expert needs."""
    world, count = ToyWorld(seed, level=level), 0
    while not world.is_done:
        world.press(world.expert_button())
        count += 1
    return count


def play_room(game: Emulator, player: ButtonPlayer, *, seed: int, level: int, stuck: int) -> RoomResult:
    """Play a room; a copy of it in Python, where the same buttons are pressed, knows when it is over."""
    twin = ToyWorld(seed, level=level)
    result: PlayResult = play(
        game,
        player,
        goal=twin.goal,
        max_turns=3 * count_expert_turns(seed, level),
        stuck=stuck or None,
        rng=random.Random(seed),
        is_done=lambda: twin.is_done,
        on_turn=lambda turn, _: twin.press(turn.pressed[0]),
    )
    return RoomResult(result.ended == "done", tuple(result.buttons))


def play_everywhere(player: ButtonPlayer, *, seed: int, level: int, stuck: int) -> dict[str, RoomResult]:
    """Play one room in each of `GAMES`, one after the other: stable-retro runs one game a process."""
    room = {"seed": seed, "level": level, "stuck": stuck}
    results = {"Python": play_room(ToyEmulator(seed, level=level), player, **room)}
    with tempfile.TemporaryDirectory() as folder:
        rom = Path(folder) / "toy.gba"
        rom.write_bytes(build_rom(seed, level))
        console = open_emulator(str(rom), timing=PressTiming())
        results["ROM in mGBA"] = play_room(console, player, **room)
        console.close()
        frames = RomFrames(rom)
        with SkyEmuServer(SkyEmuState(frames, rom_path=str(rom))) as server:
            client = open_emulator(server.url, timing=PressTiming())
            results["ROM over SkyEmu's HTTP"] = play_room(client, player, **room)
            client.close()
        frames.close()
    return results


def main() -> None:
    (options,) = cli.parse_options(SameButtonsOptions, description=__doc__)
    player = load_model_player(PlayOptions(model_path=options.model_path))
    seeds = range(options.first_seed, options.first_seed + options.num_rooms)
    rooms = [
        play_everywhere(player, seed=seed, level=options.level, stuck=options.stuck)
        for seed in tqdm(seeds, desc="rooms")
    ]
    different = [
        seed
        for seed, results in zip(seeds, rooms, strict=True)
        if len({result.buttons for result in results.values()}) > 1
    ]
    record = {
        "solved": {game: sum(results[game].solved for results in rooms) for game in GAMES},
        "num_rooms": len(rooms),
        "num_turns": {game: sum(len(results[game].buttons) for results in rooms) for game in GAMES},
        "rooms_with_other_buttons": different,
        "unsolved": {
            game: [seed for seed, one in zip(seeds, rooms, strict=True) if not one[game].solved] for game in GAMES
        },
        "options": asdict(options),
    }
    if options.json:
        print(json.dumps(record, indent=2))
        return
    rows = [(game, f"{record['solved'][game]} of {len(rooms)}", str(record["num_turns"][game])) for game in GAMES]
    print(format_table([("", "solved", "turns"), *rows]))
    print(f"rooms in which not all three pressed the same buttons: {different or 'none'}")
    print(f"unsolved: {record['unsolved']}")


if __name__ == "__main__":
    cli.run(main)
