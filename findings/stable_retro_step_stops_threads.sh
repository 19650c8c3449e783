#!/bin/bash
# stable-retro 1.0.1: while the emulator computes a frame, no other thread of Python runs.
#
# Assumed: the core is C++ and works on its own memory, so its long calls release Python's lock, as NumPy's and torch's do:
# a thread can encode the last picture, or a model choose the next button, meanwhile.
# What happens: RetroEmulator.step and what env.step is made of keep the lock. A second thread gets what is left between calls.
# To use two cores takes processes; stable-retro allows one emulator in each anyway.
#
# Seen with stable-retro 1.0.1 (2026-11-30, two cores), the game Airstriker that comes with it:
#   a counting thread next to 600 frames of the emulator does 0.0x of what it does next to a main thread that sleeps
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet stable-retro==1.0.1
"$tmp/venv/bin/python" - <<'P'
import threading
import time

import stable_retro

env = stable_retro.make("Airstriker-Genesis-v0", render_mode="rgb_array")
env.reset()
emulator, count, is_over = env.em, [0], threading.Event()


def counting() -> None:
    while not is_over.is_set():
        count[0] += 1


threading.Thread(target=counting, daemon=True).start()


def rate(act) -> float:
    began, before = time.perf_counter(), count[0]
    act()
    return (count[0] - before) / (time.perf_counter() - began)


def frames() -> None:
    for _ in range(600):
        emulator.step()


frames()
asleep, busy = rate(lambda: time.sleep(1)), rate(frames)
is_over.set()
print(f"a counting thread next to 600 frames of the emulator does {busy / asleep:.2f} of what it does next to a sleeping one")
assert busy < 0.5 * asleep, "the behaviour changed"
P
