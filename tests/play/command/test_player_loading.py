"""The player that the options ask for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pokegemma.data.convert import WindowOptions
from pokegemma.errors import PokegemmaError
from pokegemma.play.cached_player import CachedPlayer
from pokegemma.play.command.loading import load_model_player
from pokegemma.play.command.options import PlayOptions
from pokegemma.play.command.session import play_session
from pokegemma.play.history import PlayView
from pokegemma.play.plain_player import PlainPlayer
from pokegemma.play.server_player import ServerPlayer


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose run.json says that it learned from two frames in layout frames."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    shutil.copytree(tiny_model, folder)
    window = {"num_frames": 2, "min_frames": 2, "max_gap_s": 5.0}
    training = {"stage": "train", "options": {"layout": "frames"}, "window": window}
    record = {"stage": "merge", "image_size_px": 56, "training": training}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_a_model_is_played_as_it_was_trained(trained: Path) -> None:
    player = load_model_player(PlayOptions(model_path=str(trained), device="cpu"))
    assert isinstance(player, CachedPlayer)
    assert player.history.view == PlayView("frames", WindowOptions(2, 2, 5.0))


def test_options_replace_what_run_json_says(trained: Path) -> None:
    options = PlayOptions(model_path=str(trained), device="cpu", layout="grid", num_frames=3, max_gap_s=7.0)
    assert load_model_player(options).history.view == PlayView("grid", WindowOptions(3, 2, 7.0))


def test_the_model_of_a_server_is_shown_what_its_folder_says(trained: Path) -> None:
    player = load_model_player(PlayOptions(server="http://127.0.0.1:8000", model_path=str(trained)))
    assert isinstance(player, ServerPlayer)
    assert player.history.view == PlayView("frames", WindowOptions(2, 2, 5.0))
    assert player._size == (56, 56)
    alone = load_model_player(PlayOptions(server="http://127.0.0.1:8000"))
    assert (alone.history.view, alone._size) == (PlayView("grid", WindowOptions(4, 4, 30.0)), (896, 896))
    with pytest.raises(PokegemmaError, match="--server 127"):
        load_model_player(PlayOptions(server="127.0.0.1:8000"))


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_another_family_plays_without_a_cache(name: str, other_models: Callable[[str], Path], tmp_path: Path) -> None:
    options = PlayOptions(
        model_path=str(other_models(name)), device="cpu", layout="grid", max_turns=2, record=str(tmp_path), quiet=True
    )
    assert isinstance(load_model_player(options), PlainPlayer)
    summary = play_session(options)
    assert [turn.decided_by for turn in summary.result.turns] == [f"model:{options.model_path}"] * 2


def test_a_recorded_model_names_itself_and_what_it_saw(trained: Path, tmp_path: Path) -> None:
    options = PlayOptions(
        model_path=str(trained), device="cpu", max_turns=2, record=str(tmp_path), decide="generate", quiet=True
    )
    facts = json.loads((play_session(options).session / "journal.jsonl").read_text().splitlines()[0])["session"][
        "facts"
    ]
    assert (facts["player"], facts["view"]["layout"]) == (str(trained), "frames")
    assert facts["view"]["window"]["num_frames"] == 2
