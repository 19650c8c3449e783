#!/bin/bash
# stable-retro 1.0.1: with its filtered actions, and its discrete ones, START cannot be pressed on GBA, GB and GBC.
#
# Assumed: an environment's default action space (Actions.FILTERED) allows what the console's buttons are.
# What happens: the cores' lists of allowed actions leave START out, so the filter drops it, without a word. A Pokémon game
# then shows its menu to nobody.
#
# Seen with stable-retro 1.0.1 (2026-11-29):
#   GameBoy: buttons A B DOWN LEFT RIGHT SELECT START UP; in no action: START
#   GbColor: buttons A B DOWN LEFT RIGHT SELECT START UP; in no action: START
#   GbAdvance: buttons A B DOWN L LEFT R RIGHT SELECT START UP; in no action: START
# Way round: Actions.ALL, or RetroEmulator.set_button_mask.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet stable-retro==1.0.1
"$tmp/venv/bin/python" - <<'P'
import stable_retro

for system in ("GameBoy", "GbColor", "GbAdvance"):
    core = stable_retro.get_system_info(system)
    buttons = set(filter(None, core["buttons"]))
    in_actions = {button for group in core["actions"] for action in group for button in action}
    print(f"{system}: buttons {' '.join(sorted(buttons))}; in no action: {' '.join(sorted(buttons - in_actions))}")
    assert buttons - in_actions == {"START"}, "the behaviour changed"
P
