"""The tokens of the eight buttons, by which a button is scored and found in an answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from pokegemma.data import prompts


@dataclass(frozen=True)
class ButtonTokens:
    """The tokens of the eight buttons at the beginning of an answer.

    Attributes:
        prefix: tokens that all answers begin with.
        branches: for each of `prompts.BUTTONS`, in order, the tokens that follow until no other button is possible; no
            branch is the beginning of another.
    """

    prefix: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ButtonTokens":
        return cls.of_answers(
            tokenizer,
            [prompts.build_output(button=button, reasoning="", context="") for button in prompts.BUTTONS],
        )

    @classmethod
    def of_answers(cls, tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> "ButtonTokens":
        """Return the tokens that tell any answers apart, such as the actions of a battle, in the order of `answers`.

        Raises:
            ValueError: the tokenizer gives two answers the same tokens.
        """
        rows = [tuple(ids) for ids in tokenizer(list(answers), add_special_tokens=False)["input_ids"]]
        if len(set(rows)) < len(rows):
            raise ValueError("the tokenizer gives two answers the same tokens")
        start = next(at for at, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)

        def branch(row: tuple[int, ...]) -> tuple[int, ...]:
            others = [other for other in rows if other != row]
            end = next(at for at in range(start + 1, len(row) + 1) if all(row[:at] != other[:at] for other in others))
            return row[start:end]

        return cls(prefix=rows[0][:start], branches=tuple(branch(row) for row in rows))

    def locate(self, answer: Sequence[int]) -> tuple[int, int, int]:
        """Return (button index, start, end): which button the tokens of an answer name, and where in them.

        Raises:
            ValueError: the answer does not begin with `prefix`, or names none of the buttons.
        """
        start = len(self.prefix)
        if tuple(answer[:start]) == self.prefix:
            for index, branch in enumerate(self.branches):
                if tuple(answer[start : start + len(branch)]) == branch:
                    return index, start, start + len(branch)
        raise ValueError(f"not an answer: {list(answer[: start + 4])}")
