"""Play battles against people: on a server of this machine that is started here, or on another one.

python scripts/battles_online.py --player heuristic --battle_format gen1randombattle --num_battles 1

Starts Pokémon Showdown's server on 127.0.0.1, prints the address to open in a browser, accepts challenges in the format
and ends the server after the last battle. --server names another server, where your own account plays and the rules of
that server apply; --ladder looks for opponents there instead of waiting for challenges.
"""

import contextlib
import datetime
import itertools
import logging
from dataclasses import dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.errors import PokegemmaError, check_range, check_ranges
from pokegemma.options import option
from pokegemma.settings import read_api_key

logger = logging.getLogger(__name__)


@dataclass
class BattlesOnlineOptions:
    player: str = option("heuristic", "Who plays: random, max-base-power, heuristic, or NAME=SOURCE as in the arena.")
    battle_format: str = option("gen1randombattle", "Format as Pokémon Showdown names it: gen1ou, gen9randombattle.")
    num_battles: int = option(1, "Battles to play.")
    opponents: list[str] = option([], "Users whose challenges are accepted. Default: everybody's.", nargs="+")
    output_dir: str | None = option(None, "Folder for trajectory files of the battles. Default: none are written.")
    teams_file: str | None = option(
        None,
        "Teams as Showdown's team builder exports them, for formats without random teams. Default: pokegemma's own.",
    )
    timeout_s: float = option(20.0, "Seconds for a decision; then the strongest legal move is played.")
    port: int = option(8000, "Port of the server that is started here.")
    server: str | None = option(
        None, "Another server: wss://HOST/showdown/websocket. Read its rules first. Default: one of this machine's."
    )
    user_name: str = option("pokegemma", "Name to play under; with --server, of your account.")
    password_variable: str | None = option(
        None, "Environment variable with the account's password, for servers that ask for one."
    )
    ladder: bool = option(False, "Look for opponents on the ladder of --server.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_battles", at_least=1)
        check_ranges(self, "port", at_least=1, at_most=65535)
        check_range("--timeout_s", self.timeout_s, above=0)
        if self.server is None and (self.ladder or self.password_variable):
            raise PokegemmaError("--ladder and --password_variable need --server")
        if self.server is not None and self.user_name == BattlesOnlineOptions.user_name:
            raise PokegemmaError("--server needs the --user_name of your account")


def main() -> None:
    (options,) = parse_options(BattlesOnlineOptions, description=__doc__)
    from pokegemma.battles.online.connection import ShowdownConnection
    from pokegemma.battles.online.local_server import LocalServer
    from pokegemma.battles.online.matches import MatchPlayer
    from pokegemma.battles.online.recorded import write_match
    from pokegemma.battles.players.opening import PlayerSource
    from pokegemma.battles.players.player import Decider, describe_replaced
    from pokegemma.battles.simulator import Simulator
    from pokegemma.battles.teams import read_teams
    from pokegemma.battles.trajectories.from_battle import state_from_battle

    player = PlayerSource.parse(options.player, flag="--player").open()
    password = read_api_key("--password_variable", options.password_variable)
    with Simulator() as simulator:
        battle_format = simulator.describe_format(options.battle_format)
        teams = read_teams(simulator, battle_format, options.teams_file and Path(options.teams_file))
    drawn = itertools.cycle(teams or [None])
    with contextlib.ExitStack() as stack:
        url = options.server
        if url is None:
            server = stack.enter_context(LocalServer(options.port))
            url = server.url
            print(f"open {server.page} in a browser, and challenge {options.user_name!r} to {battle_format.name}")
        connection = stack.enter_context(ShowdownConnection(url, user_name=options.user_name, password=password))
        decider = stack.enter_context(contextlib.closing(Decider(player, timeout_s=options.timeout_s)))
        matches = MatchPlayer(
            connection,
            decider,
            battle_format,
            draw_team=lambda: next(drawn),
            observer=lambda seat: state_from_battle(seat.battle),
            opponents=tuple(options.opponents),
        )
        for match in matches.play(options.num_battles, "ladder" if options.ladder else "challenges"):
            outcome = {True: "won", False: "lost", None: "tied"}[match.won]
            print(f"{match.room}: {outcome} against {match.opponent} after {match.num_turns} turns", flush=True)
            if match.num_timeouts or match.num_unanswered:
                print(f"{match.room}: {describe_replaced(match.num_timeouts, match.num_unanswered)}", flush=True)
            if options.output_dir is not None:
                write_match(Path(options.output_dir), match, player=options.user_name, moment=datetime.datetime.now())


if __name__ == "__main__":
    run(main)
