#!/bin/bash
# stable-retro 1.0.1: after set_state, get_screen returns the picture from before it, until the next step().
#
# Assumed: set_state goes back to a moment, and get_screen then returns the picture of that moment.
# What happens: the state is loaded, and the picture is still that of the frame that was drawn last. An observation that is
# taken right after a reset by set_state shows another game.
#
# Seen with stable-retro 1.0.1, mGBA (2026-11-29):
#   saved: red; later: green; after set_state: green; one step later: red
# Way round: keep the picture together with the state, or step once, which is a frame further.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet stable-retro==1.0.1
cat >"$tmp/look.py" <<'P'
import sys

import numpy as np
from stable_retro import RetroEmulator

# The backdrop is red, and green while A is pressed.
program = [
    0xE3A00301,  # mov r0, #0x04000000
    0xE3A01405,  # mov r1, #0x05000000
    0xE3A02000,  # mov r2, #0
    0xE1C020B0,  # strh r2, [r0]: mode 0 without backgrounds
    0xE2803E13,  # add r3, r0, #0x130
    0xE1D320B0,  # loop: ldrh r2, [r3]: the buttons
    0xE3120001,  # tst r2, #1
    0x13A0401F,  # movne r4, #0x1f
    0x03A04E3E,  # moveq r4, #0x3e0
    0xE1C140B0,  # strh r4, [r1]
    0xEAFFFFF9,  # b loop
]
rom = bytearray(0xC0)
rom[0:4] = (0xEA00002E).to_bytes(4, "little")
rom[0xB2] = 0x96
path = f"{sys.argv[1]}/game.gba"
with open(path, "wb") as file:
    file.write(bytes(rom) + b"".join(word.to_bytes(4, "little") for word in program))

emulator = RetroEmulator(path)
a_pressed = np.zeros(12, np.uint8)
a_pressed[8] = 1


def run(mask, frames=4):
    emulator.set_button_mask(mask, 0)
    for _ in range(frames):
        emulator.step()


def colour():
    red, green, _ = emulator.get_screen()[80, 120]
    return "red" if red > green else "green"


run(np.zeros(12, np.uint8))
state, saved = emulator.get_state(), colour()
run(a_pressed)
later = colour()
emulator.set_state(state)
emulator.set_button_mask(np.zeros(12, np.uint8), 0)
at_once = colour()
emulator.step()
print(f"saved: {saved}; later: {later}; after set_state: {at_once}; one step later: {colour()}")
assert (saved, later, at_once, colour()) == ("red", "green", "green", "red"), "the behaviour changed"
P
"$tmp/venv/bin/python" "$tmp/look.py" "$tmp"
