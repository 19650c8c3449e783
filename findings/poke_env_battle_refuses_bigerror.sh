#!/bin/bash
# poke-env 0.16.1: a Battle raises NotImplementedError at a line of Showdown's protocol that its Player takes for a warning.
#
# Assumed: Battle.parse_message reads every line of a battle's log, since the players keep their state with it.
# What happens: Player filters some lines before. `bigerror` (the warning that a battle will soon be tied by its length) is
# one of them; a program that feeds a simulator's stream to Battle itself loses the longest battles only, from turn 500 on.
#
# Seen with poke-env 0.16.1 (2026-11-30):
#   |turn|1: read
#   |bigerror|...: NotImplementedError
# Way round: leave `bigerror` out, as Player does.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet poke-env==0.16.1
"$tmp/venv/bin/python" - <<'P'
import logging

from poke_env.battle import Battle

battle = Battle("battle-gen1ou-1", "someone", logging.getLogger("battle"), gen=1)
battle.parse_message(["", "turn", "1"])
print("|turn|1: read")
try:
    battle.parse_message(["", "bigerror", "You will auto-tie if the battle does not end in 100 turns."])
except NotImplementedError as error:
    print(f"|bigerror|...: {type(error).__name__}")
else:
    raise SystemExit("the behaviour changed")
P
