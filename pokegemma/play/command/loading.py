"""Make the player that the options ask for."""

import logging
import random
from pathlib import Path
from typing import Any

from pokegemma.evaluation.predict import load_predictor
from pokegemma.evaluation.view import resolve_view, resolve_window
from pokegemma.gemma.families import family_of
from pokegemma.play.cached_player import CachedPlayer
from pokegemma.play.command.options import PlayOptions
from pokegemma.play.history import PlayView
from pokegemma.play.plain_player import PlainPlayer
from pokegemma.play.players import ButtonPlayer
from pokegemma.play.server_player import ServerPlayer
from pokegemma.provenance import read_run_record
from pokegemma.serving.client import split_url
from pokegemma.settings import read_api_key

logger = logging.getLogger(__name__)

_IMAGE_SIZE_PX = 896


def choose_play_view(options: PlayOptions) -> PlayView:
    """Return how play is shown to the model: as in its training, as far as options do not say otherwise.

    Raises:
        PokegemmaError: run.json is damaged, or a value is out of range.
    """
    view = resolve_view(options.model_path, layout=options.layout)
    window = resolve_window(options.model_path, num_frames=options.num_frames, max_gap_s=options.max_gap_s)
    return PlayView(view.layout, window, view.max_decisions, view.overlap_decisions)


def load_model_player(options: PlayOptions) -> ButtonPlayer:
    """Return a player for --model_path or --server.

    Raises:
        PokegemmaError: the model cannot be loaded, or the options do not fit it.
    """
    view = choose_play_view(options)
    frames = "1 frame" if view.window.num_frames == 1 else f"{view.window.num_frames} frames"
    logger.info("shown to the model: layout %s, %s; new after %g s", view.layout, frames, view.window.max_gap_s)
    drawing = {"decide": options.decide, "temperature": options.temperature, "rng": random.Random(options.seed)}
    if options.server is not None:
        return _server_player(options, view, drawing)
    predictor = load_predictor(
        options.model_path,
        layout=view.layout,
        dtype=options.dtype,
        device=options.device,
        max_new_tokens=options.max_new_tokens,
    )
    if family_of(predictor.model.config).inexact:
        return PlainPlayer(predictor, view, name=options.model_path, **drawing)
    return CachedPlayer(predictor, view, name=options.model_path, **drawing)


def _server_player(options: PlayOptions, view: PlayView, drawing: dict[str, Any]) -> ServerPlayer:
    split_url(options.server, shown=f"--server {options.server}")
    record = (options.model_path and read_run_record(Path(options.model_path))) or {}
    return ServerPlayer(
        options.server,
        view,
        image_size_px=options.image_size or record.get("image_size_px") or _IMAGE_SIZE_PX,
        model=options.server_model,
        max_new_tokens=options.max_new_tokens,
        timeout_s=options.timeout_s,
        api_key=read_api_key("--api_key_variable", options.api_key_variable),
        **drawing,
    )
