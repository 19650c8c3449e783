"""A stand-in for Pokémon Showdown's server, for tests: one user connects, and is challenged to battles by "ann".

The battles are real ones of the simulator; ann plays at random. It follows PROTOCOL.md as far as one battle after the
other needs it.
"""

import contextlib
import threading
from collections.abc import Iterator

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from pokegemma.battles.legal_actions import find_legal_actions
from pokegemma.battles.players.player import BattleDecision, Decider
from pokegemma.battles.players.scripted import RandomBattlePlayer
from pokegemma.battles.seat import Seat
from pokegemma.battles.simulated_battle import BattleSpec
from pokegemma.battles.simulator import Simulator


class StandIn:
    """What happened at the server.

    Attributes:
        received: the commands of the user.
        refuses_choices: the server answers each choice with an error, as it does to an illegal one.
    """

    def __init__(self, battle_format: str, *, greeting: tuple[str, ...], refuses_choices: bool = False) -> None:
        self.received: list[str] = []
        self.url = ""
        self._format, self._greeting = battle_format, greeting
        self.refuses_choices = refuses_choices
        self._num_battles = 0
        self.sockets: list[ServerConnection] = []

    def talk(self, socket: ServerConnection) -> None:
        self.sockets.append(socket)
        socket.send("|challstr|4|abc")
        with contextlib.suppress(ConnectionClosed):
            for text in socket:
                command = text.partition("|")[2]
                self.received.append(command)
                words = command.split(" ", 1)
                if words[0] == "/trn":
                    self.user_name = words[1].split(",")[0]
                    socket.send(f"|updateuser| {self.user_name}|1|1|{{}}")
                    for line in self._greeting:
                        socket.send(line.replace("USER", self.user_name))
                elif words[0] == "/noreply":
                    socket.send(f">{words[1].removeprefix('/leave ')}\n|deinit")
                elif words[0] == "/accept" or words[0] == "/search":
                    self._num_battles += 1
                    self._play(socket, f"battle-{self._format}-{self._num_battles}")

    def _play(self, socket: ServerConnection, room: str) -> None:
        socket.send(f">{room}\n|init|battle\n|title|{self.user_name} vs. ann\n|j|☆{self.user_name}\n|request|")
        names = (self.user_name, "ann")
        with Simulator() as simulator:
            generation = simulator.describe_format(self._format).generation
            ann = Seat(battle_id="1", battle_format=self._format, role="p2", name="ann", generation=generation)
            simulator.start(BattleSpec(room, self._format, names, seed=room))
            while True:
                (news,) = simulator.receive()
                socket.send(f">{room}\n|c| ann|good luck\n{news.lines[0]}")
                ann.read(news.lines[1])
                if news.end is not None:
                    return
                waits = '"wait":true' in news.lines[0]
                mine = None if waits or "|request|" not in news.lines[0] else self._receive_choice(socket, room)
                if mine == "":
                    return
                simulator.choose(room, (mine, self._choose(ann) if ann.has_request else None))

    def _receive_choice(self, socket: ServerConnection, room: str) -> str:
        while True:
            text = socket.recv()
            self.received.append(text.partition("|")[2])
            command = self.received[-1]
            if command == "/forfeit":
                return ""
            if command.startswith("/choose ") and self.refuses_choices:
                socket.send(f">{room}\n|error|[Invalid choice] Can't move: you cannot")
            elif command.startswith("/choose "):
                return command.removeprefix("/choose ").partition("|")[0]

    def _choose(self, ann: Seat) -> str:
        ann.answered()
        legal = find_legal_actions(ann.battle)
        decision = BattleDecision("1", "p2", ann.num_decisions, "1", ann.battle, legal)
        ann.num_decisions += 1
        (choice,) = Decider(RandomBattlePlayer()).decide([decision])
        return legal[choice.action].choice


CHALLENGE = "|pm| ann| USER|/challenge FORMAT|FORMAT|||"


@contextlib.contextmanager
def run_stand_in(
    battle_format: str, *, challenges: tuple[str, ...] = (), refuses_choices: bool = False
) -> Iterator[StandIn]:
    """Run a server that sends a challenge to each format once the user is logged in."""
    greeting = tuple(CHALLENGE.replace("FORMAT", each) for each in challenges)
    stand_in = StandIn(battle_format, greeting=greeting, refuses_choices=refuses_choices)
    with serve(stand_in.talk, "127.0.0.1", 0) as server:
        stand_in.url = f"ws://127.0.0.1:{server.socket.getsockname()[1]}/showdown/websocket"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield stand_in
        finally:
            server.shutdown()
            thread.join()
            for socket in stand_in.sockets:
                socket.close()
