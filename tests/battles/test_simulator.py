"""The node process: formats, teams, seeds, and what it costs when it dies."""

import os
import signal
import time

import pytest

from pokegemma.battles.simulated_battle import BattleLost, BattleNews, BattleSpec, derive_seed
from pokegemma.battles.simulator import Simulator
from pokegemma.errors import PokegemmaError
from tests.battles.simulated import TEAM, make_specs
from tests.processes import wait_until_ended


def start(simulator: Simulator, spec: BattleSpec) -> tuple[str, str]:
    """Begin a battle, drop it, and return the first lines that both players see."""
    simulator.start(spec)
    (news,) = simulator.receive()
    simulator.stop(spec.battle_id)
    return news.lines


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gen1nothing", "no format of this name"),
        ("gen9doublesou", "doubles"),
        ("gen9customgame", "exact HP"),
    ],
)
def test_a_format_is_refused(simulator: Simulator, name: str, words: str) -> None:
    with pytest.raises(PokegemmaError, match=words) as caught:
        simulator.describe_format(name)
    assert name in str(caught.value)


def test_a_format_is_described(simulator: Simulator) -> None:
    ou, random_teams = simulator.describe_format("gen1ou"), simulator.describe_format("gen9randombattle")
    assert (ou.generation, ou.has_random_teams) == (1, False)
    assert (random_teams.generation, random_teams.has_random_teams) == (9, True)


def test_the_validator_fills_in_what_a_team_leaves_out(simulator: Simulator) -> None:
    """Without it Tauros has 290 HP, and the blank ability of generation 1 becomes a modern one when it is unpacked."""
    team = simulator.validate_team("gen1ou", TEAM)
    spec = BattleSpec("1", "gen1ou", ("ann", "bob"), seed="0", teams=(team, team))
    request = next(line for line in start(simulator, spec)[0].splitlines() if line.startswith("|request|"))
    assert '"condition":"353/353"' in request
    assert '"baseAbility":"noability"' in request and "intimidate" not in request


def test_a_banned_pokemon_is_refused(simulator: Simulator) -> None:
    with pytest.raises(PokegemmaError, match="Mewtwo is tagged Uber"):
        simulator.validate_team("gen1ou", "Mewtwo\n- Psychic\n")


def test_a_text_that_is_not_a_team_is_refused(simulator: Simulator) -> None:
    with pytest.raises(PokegemmaError, match="gen1ou"):
        simulator.validate_team("gen1ou", "\n")


def test_a_seed_has_four_numbers() -> None:
    """With fewer, Pokémon Showdown gives the same stream for every seed."""
    seeds = {derive_seed("a", number) for number in range(100)}
    assert len(seeds) == 100
    assert all(
        len(numbers) == 4 and all(int(number) < 65536 for number in numbers)
        for numbers in (seed.split(",") for seed in seeds)
    )


def test_random_teams_come_from_the_seed_and_the_role(simulator: Simulator) -> None:
    first, again, other = (
        start(simulator, BattleSpec("1", "gen1randombattle", ("ann", "bob"), seed=seed)) for seed in ("7", "7", "8")
    )
    teams = [[line for line in lines.splitlines() if line.startswith("|request|")] for lines in (*first, *other)]
    assert first == again
    assert len({lines[0].partition('"pokemon"')[2] for lines in teams}) == 4


def test_players_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="ann"):
        BattleSpec("1", "gen1ou", ("ann", "ann"), seed="0")


@pytest.mark.parametrize("choice", ["move 1\n>eval process.exit()", ">eval 1", "move 5", "team 1234567", "undo"])
def test_only_choices_reach_the_simulator(simulator: Simulator, choice: str) -> None:
    """Its stream runs what follows ">eval" as JavaScript."""
    process_ids = simulator.process_ids
    (spec,) = make_specs(1)
    simulator.start(spec)
    simulator.receive()
    simulator.choose(spec.battle_id, (choice, None))
    (lost,) = simulator.receive()
    assert isinstance(lost, BattleLost) and not lost.process_died
    assert "not a choice" in lost.reason
    assert simulator.process_ids == process_ids


def test_a_battle_in_flight_cannot_be_started_again(simulator: Simulator) -> None:
    (spec,) = make_specs(1)
    simulator.start(spec)
    with pytest.raises(ValueError, match=spec.battle_id):
        simulator.start(spec)
    simulator.stop(spec.battle_id)
    assert simulator.receive() == []


def test_a_killed_process_costs_only_the_battles_in_it(simulator: Simulator) -> None:
    with Simulator(num_processes=2) as two:
        specs = make_specs(4)
        for spec in specs:
            two.start(spec)
        killed, other = two.process_ids
        os.kill(killed, signal.SIGKILL)
        lost = []
        while len(lost) < 2:
            lost += [event for event in two.receive() if isinstance(event, BattleLost)]
        assert sorted(event.battle_id for event in lost) == ["battle-0", "battle-2"]
        assert all(event.process_died and str(killed) in event.reason for event in lost)
        two.start(specs[0])
        while not any(event.battle_id == "battle-0" for event in two.receive()):
            pass
        assert other in two.process_ids and len(two.process_ids) == 2


def test_a_silent_process_is_ended_and_replaced(simulator: Simulator) -> None:
    with Simulator() as impatient:
        (spec,) = make_specs(1)
        impatient.describe_format("gen1ou")  # a busy machine may need longer than the limit to start
        impatient.timeout_s = 0.5
        (stuck,) = impatient.process_ids
        os.kill(stuck, signal.SIGSTOP)
        impatient.start(spec)
        (lost,) = impatient.receive()
        assert lost.process_died and "sent nothing for 0.5 s" in lost.reason
    wait_until_ended([stuck])


@pytest.mark.slow(3)
def test_a_caller_that_takes_long_loses_no_process(simulator: Simulator) -> None:
    """What it has sent is only written when it waits the next time."""
    with Simulator() as patient:
        (spec,) = make_specs(1)
        patient.start(spec)
        patient.receive()
        process_ids = patient.process_ids
        patient.choose(spec.battle_id, ("move 1", None))
        patient.timeout_s = 2.0
        time.sleep(2.2)
        (news,) = patient.receive()
        assert isinstance(news, BattleNews) and patient.process_ids == process_ids


def test_the_processes_end_with_the_simulator(simulator: Simulator) -> None:
    with Simulator() as short:
        short.describe_format("gen1ou")
        process_ids = short.process_ids
    wait_until_ended(process_ids)
    assert short.process_ids == []
