"""Write battles on a server as trajectory files of our own view."""

import datetime
from pathlib import Path

from pokegemma.battles.online.connection import simplify_name
from pokegemma.battles.online.matches import MatchResult
from pokegemma.battles.trajectories.files import TrajectoryName, format_date, write_trajectory
from pokegemma.battles.trajectories.records import NO_ACTION, BattleTrajectory


def write_match(folder: Path, match: MatchResult, *, player: str, moment: datetime.datetime) -> Path | None:
    """Write FOLDER/FORMAT/NAME.json.lz4; None for a battle that ended before its first decision.

    Args:
        player: our name.
        moment: when the battle ended.
    """
    if not match.steps or match.last_record is None:
        return None
    rating = match.rating if match.rating.isdigit() else "Unrated"
    names = [simplify_name(name) or "nobody" for name in (player, match.opponent)]
    name = TrajectoryName(match.room, rating, *names, format_date(moment), bool(match.won))
    states = (*(step.record for step in match.steps), match.last_record)
    actions = (*(step.action for step in match.steps), NO_ACTION)
    return write_trajectory(folder, name, BattleTrajectory(states, actions))
