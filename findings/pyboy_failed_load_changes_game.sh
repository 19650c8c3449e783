#!/bin/bash
# PyBoy 2.8.1: load_state of a state that is cut off raises an error, and leaves the game half changed.
#
# Assumed: where load_state raises, the game is still what it was, as with every other emulator's load.
# What happens: the parts before the cut have been loaded, those after it not. The game goes on from a mixture of two moments.
#
# Seen with PyBoy 2.8.1 (2026-11-29):
#   PyBoyAssertException: No data
#   the byte at 0xC000 was 2 before the failed load and is 1 after it
# Way round: check the length or a checksum of a state before PyBoy sees it, or save the state first and load it after an error.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet pyboy==2.8.1 pillow
"$tmp/venv/bin/python" - 2>/dev/null <<'P'
import io

from pyboy import PyBoy
from pyboy.utils import PyBoyException

rom = bytearray(0x8000)
rom[0x100:0x102] = b"\x18\xfe"  # jr to itself
rom[0x14D] = -sum(byte + 1 for byte in rom[0x134:0x14D]) % 256  # the header's checksum

pyboy = PyBoy(io.BytesIO(rom), window="null", sound_emulated=False)
pyboy.set_emulation_speed(0)
pyboy.tick(80)
pyboy.memory[0xC000] = 1
saved = io.BytesIO()
pyboy.save_state(saved)
pyboy.memory[0xC000] = 2

before = pyboy.memory[0xC000]
try:
    pyboy.load_state(io.BytesIO(saved.getvalue()[: len(saved.getvalue()) * 9 // 10]))
except PyBoyException as error:
    print(f"{type(error).__name__}: {error}")
else:
    raise SystemExit("a state that is cut off was loaded without an error: the behaviour changed")
after = pyboy.memory[0xC000]
pyboy.stop(save=False)
print(f"the byte at 0xC000 was {before} before the failed load and is {after} after it")
assert (before, after) == (2, 1), "the behaviour changed"
P
