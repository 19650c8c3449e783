"""Where the encoder of an actor-critic is, by actor_critic.json in its folder: also after both were moved together."""

import json
import os
from pathlib import Path
from typing import Any

from pokegemma.errors import PokegemmaError

SHAPE_FILE = "actor_critic.json"
ADAPTER_FOLDER = "encoder_adapter"
"""Of the adapter of an encoder that was trained, in the folder of the actor-critic."""


def describe_path(encoder: str, folder: Path) -> dict[str, str]:
    """Return what actor_critic.json in a folder says of where the encoder is: a folder, or a Hub id."""
    if not Path(encoder).is_dir():
        return {"encoder": encoder}
    path = Path(encoder).resolve()
    return {"encoder": str(path), "encoder_relative": os.path.relpath(path, folder.resolve())}


def read_shape_file(folder: Path) -> dict[str, Any]:
    """Return the content of actor_critic.json.

    Raises:
        PokegemmaError: it is missing or damaged.
    """
    try:
        record = json.loads((folder / SHAPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PokegemmaError(f"{folder} is not the result of scripts/rl_battles.py: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("encoder"), str):
        raise PokegemmaError(f"{folder} is not the result of scripts/rl_battles.py: {SHAPE_FILE} names no encoder")
    return record


def find_encoder(folder: Path) -> str:
    """Return the encoder of the actor-critic in a folder.

    Where it is seen from the folder comes first, then where it was in training.

    Raises:
        PokegemmaError: as `read_shape_file`, or the encoder is at neither place.
    """
    record = read_shape_file(folder)
    encoder, relative = record["encoder"], record.get("encoder_relative")
    places = [encoder] if relative is None else [os.path.normpath(folder / relative), encoder]
    found = next((place for place in places if Path(place).is_dir()), None)
    if found is None and relative is not None:
        raise PokegemmaError(f"{folder}: its encoder is not at {' or '.join(dict.fromkeys(places))}; move it there")
    return found or encoder
