import os
import random
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.eevee_v1.sessions import read_session
from pokegemma.data.samples import read_samples
from pokegemma.provenance import PROJECT_ROOT
from tests.processes import killed_after

NUM_KILLS = 30


def record_and_kill(folder, delay_s):
    """Start a recorder, kill it `delay_s` after its first new turn, and return the last turn that it had recorded."""
    command = [sys.executable, "-m", "tests.play.recording.record_until_killed", str(folder)]
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)
    with killed_after(process):
        assert process.stdout.readline() == "ready\n"
        first = process.stdout.readline()
        time.sleep(delay_s)
        os.kill(process.pid, signal.SIGKILL)
        printed = first + process.stdout.read()
    return int(printed[: printed.rindex("\n")].split("\n")[-1])


@pytest.mark.slow(7)
def test_killed_at_thirty_moments_a_session_loses_at_most_the_turn_in_flight(tmp_path):
    moments, folder = random.Random(7), tmp_path / "runs" / "session_s"
    for _ in range(NUM_KILLS):
        confirmed = record_and_kill(folder, moments.uniform(0, 0.03))
        session = read_session(folder)
        numbers = [turn.number for turn in session.turns]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) in (confirmed, confirmed + 1)
        assert all(len(turn.frames) == 1 for turn in session.turns)
    starts = [turn.number for turn in session.turns if turn.new_start]
    assert len(starts) == NUM_KILLS - 1
    report = convert_corpus(
        tmp_path / "runs", tmp_path / "out", window=WindowOptions(), eval_fraction=0.0, num_workers=1
    )
    assert (report["samples"], report["turns"]) == (len(numbers), len(numbers))
    for sample in read_samples(tmp_path / "out" / "train.jsonl"):
        with Image.open(tmp_path / "out" / sample.frames[-1]) as picture:
            turn = sample.metadata["turn"]
            assert picture.getpixel((0, 0)) == (turn % 256, turn // 256, 20)
