"""README.md of a policy: what it is, how well it plays, what it was made from; nothing about the machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pokegemma.battles.offline_rl.encoder_path import SHAPE_FILE
from pokegemma.battles.players.opening import hash_weights_of
from pokegemma.errors import PokegemmaError
from pokegemma.evaluation.metrics import wilson_interval
from pokegemma.pages import render_page
from pokegemma.provenance import is_hub_id, read_run_record
from pokegemma.release.model_card import choose_license, license_text, public_name
from pokegemma.tables import format_interval, format_percent

_TRAINING_OPTIONS = (
    *("text", "won_only", "min_rating", "formats", "since", "until", "finetuning", "lora_r", "lora_alpha"),
    *("learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "seed"),
)
"""Options that matter to a reader, none of which can contain a path or a name of the machine."""


def render_policy_card(policy: Path, arena: Path, *, player: str, name: str = "pokegemma-battles") -> str:
    """Return the model card as Markdown; the same files give the same text.

    Args:
        policy: the folder that scripts/sft_battles.py wrote.
        arena: the folder that scripts/battles_arena.py wrote.
        player: the policy's name there.

    Raises:
        PokegemmaError: a file is missing or damaged, or the player did not play in the arena with these weights.
    """
    if (policy / SHAPE_FILE).is_file():
        raise PokegemmaError(f"{policy} is a result of scripts/rl_battles.py; cards are of scripts/sft_battles.py's")
    record = read_run_record(policy) or {}
    if record.get("stage") != "train":
        raise PokegemmaError(f"{policy} is not the result of scripts/sft_battles.py: its run.json is missing")
    standings = _read_standings(arena)
    opponents = [view_pair(pair, player) for pair in standings["pairs"] if player in pair["players"]]
    if not opponents:
        raise PokegemmaError(f"{arena}: no player {player!r} in it")
    temperature = _check_played(policy, arena, player)
    base = record.get("base_model", "unknown")
    license_id = choose_license(base, "gemma3")
    return render_page(
        Path(__file__).with_name("model_card.md.jinja"),
        filters={"percent": format_percent, "interval": format_interval},
        front_matter=_front_matter(base, license_id),
        name=name,
        battle_format=standings["battle_format"],
        num_battles=min(row["wins"] + row["losses"] + row["ties"] for row in opponents),
        opponents=sorted(opponents, key=lambda row: -row["win_rate"]),
        accuracy=record.get("accuracy"),
        baselines=record.get("baselines"),
        num_eval_decisions=record.get("num_eval_decisions"),
        training=_training_rows(base, record),
        temperature=temperature,
        license_text=license_text(license_id),
    )


def _read_standings(arena: Path) -> dict[str, Any]:
    path = arena / "arena.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PokegemmaError(f"{path} cannot be read, which scripts/battles_arena.py writes: {error}") from error


def _check_played(policy: Path, arena: Path, player: str) -> float:
    """Check that a player of an arena had a policy's weights; return its temperature there."""
    known = (read_run_record(arena) or {}).get("options", {}).get("players", {})
    if player not in known:
        raise PokegemmaError(f"{arena}: its run.json does not tell with which weights {player!r} played")
    temperature, _, weights = known[player][1].partition(" ")
    if weights != hash_weights_of(policy):
        raise PokegemmaError(
            f"{arena}: {player!r} played with other weights than {policy} has now; play again under a new name"
        )
    return float(temperature)


def view_pair(pair: Mapping[str, Any], player: str) -> dict[str, Any]:
    """Return a pair as one of its players sees it."""
    first, second = pair["players"]
    if player == first:
        return {**pair, "name": second}
    wins, total = pair["losses"], pair["wins"] + pair["losses"] + pair["ties"]
    swapped = {"wins": wins, "losses": pair["wins"], "win_rate": wins / total}
    return {**pair, **swapped, "name": first, "win_rate_interval": wilson_interval(wins, total)}


def _front_matter(base: str, license_id: str) -> str:
    facts: dict[str, Any] = {"license": license_id}
    if is_hub_id(base):
        facts["base_model"] = base
    facts |= {
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "language": ["en"],
        "tags": ["pokegemma", "pokemon", "pokemon-showdown", "game-playing", "gemma3_text"],
    }
    return yaml.safe_dump(facts, sort_keys=False)


def _training_rows(base: str, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    options = record.get("options", {})
    unused = "num_train_epochs" if (options.get("max_steps") or 0) > 0 else "max_steps"  # the second wins
    rows = [("base", public_name(base)), ("fingerprint of the base", record.get("base_fingerprint", "unknown"))]
    rows += [("battles, both players' views", str((record.get("dataset") or {}).get("num_battles", "unknown")))]
    rows += [("their hash", (record.get("dataset") or {}).get("sha256", "unknown"))]
    rows += [("decisions", str(record.get("num_decisions", "unknown")))]
    rows += [("trained weights", str(record.get("num_trained_weights", "unknown")))]
    shown = [key for key in _TRAINING_OPTIONS if options.get(key) not in (None, False) and key != unused]
    rows += [(f"`{key}`", str(options[key])) for key in shown]
    rows.append(("commit", record.get("git_commit") or "unknown"))
    versions = record.get("versions") or {}
    return [*rows, ("versions", ", ".join(f"{package} {version}" for package, version in versions.items()))]
