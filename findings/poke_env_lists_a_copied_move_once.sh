#!/bin/bash
# poke-env 0.16.1: a Pokémon whose Mimic has copied a move that it knows already has three moves there, and four in a request.
#
# Assumed: the active Pokémon's `moves` and the moves of the request are the same list, so that a move's place in one can be
# numbered in the other.
# What happens: `moves` is a dictionary by name, in which the copy takes Mimic's place: two moves of one name become one. A
# program that numbers the request's moves by it gets a fourth action that no state of the battle lists. In 10,000 battles of
# gen1randombattle that was 14 of 634,157 actions.
#
# Seen with poke-env 0.16.1 (2026-11-30):
#   before: mimic reflect softboiled thunderbolt
#   Thunderbolt copied: reflect softboiled thunderbolt
# Way round: give each name of a request one number, the first place that is not disabled.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet poke-env==0.16.1
"$tmp/venv/bin/python" - <<'P'
import logging

from poke_env.battle import Battle

battle = Battle("battle-gen1ou-1", "someone", logging.getLogger("battle"), gen=1)
battle.player_role = "p1"
for line in (
    "switch|p1a: Chansey|Chansey|100/100",
    "switch|p2a: Jolteon|Jolteon|100/100",
    *(f"move|p1a: Chansey|{name}|p2a: Jolteon" for name in ("Thunderbolt", "Soft-Boiled", "Reflect", "Mimic")),
):
    battle.parse_message(["", *line.split("|")])
chansey = battle.active_pokemon
print("before:", *sorted(chansey.moves))
battle.parse_message(["", "-start", "p1a: Chansey", "Mimic", "Thunderbolt"])
print("Thunderbolt copied:", *sorted(chansey.moves))
assert len(chansey.moves) == 3, "the behaviour changed"
P
