"""What a policy reads before an action, and how it writes the action: the only place for this text.

    gen1ou foes4 me starmie hp5 ... <0> blizzard ice special120 ... foe rhydon hp2 L88 action

is the prompt of a state in its short text, and " <0>" an answer to it. Words have spaces between them, so that a
tokenizer of whole words and SentencePiece both read them.
"""

from collections.abc import Sequence

from pokegemma.battles.policy.text_kind import TextKind
from pokegemma.battles.trajectories.actions import NUM_ACTIONS
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.battles.trajectories.records import TrajectoryState
from pokegemma.battles.trajectories.short_text import action_word, list_short_words
from pokegemma.battles.trajectories.texts import list_words

QUESTION = "action"
"""The last word of every prompt."""

_WRITERS = {"short": list_short_words, "words": list_words}

ANSWERS = tuple(f" {action_word(action)}" for action in range(NUM_ACTIONS))
"""The answers that stand for actions 0 to 12."""


def write_prompt(state: TrajectoryState, text: TextKind) -> str:
    """Return the prompt of a state.

    Raises:
        TrajectoryError: the state has no such text.
    """
    return join_prompt(_WRITERS[text](state))


def join_prompt(words: Sequence[str]) -> str:
    """Return the prompt of a text's words."""
    return " ".join((*words, QUESTION))


def read_texts(battles: PackedTrajectories, index: int, text: TextKind) -> list[str]:
    """Return the prompts of a battle's states."""
    if text == "short":
        return [join_prompt([words]) for words in battles.short_texts(index)]
    return [join_prompt([battles.words[number] for number in row]) for row in battles[index].words.tolist()]
