"""Record turns into a session until the process is killed; print a turn's number when it is recorded."""

import sys
from datetime import datetime

from PIL import Image

from pokegemma.play.recording.journal import PlayedTurn, SessionJournal


def main(folder: str) -> None:
    with SessionJournal(folder, goal="leave the house", facts={"seed": 1}) as journal:
        print("ready", flush=True)
        while True:
            number = journal.num_turns + 1
            screen = Image.new("RGB", (240, 160), (number % 256, number // 256, 20))
            turn = PlayedTurn(number, datetime.now(), "up", ("up",), None, "the way", "navigation", "model")
            journal.begin(screen)
            journal.record(turn)
            print(number, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
