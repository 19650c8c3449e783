#!/bin/bash
# poke-env 0.16.1: each message of a player is printed twice where the program has set up logging, and formatting them costs.
#
# Assumed: a library logs through `logging`, and the program decides where that goes.
# What happens: every PSClient adds a StreamHandler of its own to the logger of its user name, and the records go on to the
# root logger's handlers, too. With the root at INFO each message of the server and each answer is formatted and printed
# twice: a benchmark of poke-env's players measured 2.9 ms of CPU time a turn where 1.6 ms are theirs.
#
# Seen with poke-env 0.16.1 (2026-11-30):
#   handlers of the client's logger: StreamHandler; goes on to the root logger: True
#   one message, printed 2 times
# Way round: log_level=logging.WARNING for each player, or logging.getLogger(user_name).handlers.clear().
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet poke-env==0.16.1
"$tmp/venv/bin/python" - 2>"$tmp/printed" <<'P'
import logging

from poke_env import AccountConfiguration, LocalhostServerConfiguration
from poke_env.ps_client import PSClient

logging.basicConfig(level=logging.INFO)
client = PSClient(
    AccountConfiguration("someone", None), server_configuration=LocalhostServerConfiguration, start_listening=False
)
kinds = " ".join(type(handler).__name__ for handler in client.logger.handlers)
print(f"handlers of the client's logger: {kinds}; goes on to the root logger: {client.logger.propagate}")
client.logger.info("|request|{}")
P
times=$(grep -c '|request|{}' "$tmp/printed")
echo "one message, printed $times times"
[[ $times == 2 ]] || { echo "the behaviour changed"; exit 1; }
