"""Play with a Gemma 3 in this process: the work of earlier decisions is reused, with the results of whole prompts."""

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from pokegemma.data import prompts
from pokegemma.data.samples import Sample, find_control_token
from pokegemma.data.trajectories import Trajectory
from pokegemma.evaluation.predict import Predictor, read_answer
from pokegemma.play.history import UNSEEN, History, PlayView
from pokegemma.play.players import ButtonChoice, Decide, draw_button, require_buttons
from pokegemma.play.prompt_cache import PromptCache

logger = logging.getLogger(__name__)


class CachedPlayer:
    """Choose the buttons of one session at a time, with a prefix cache; see `ButtonPlayer`.

        player = CachedPlayer(predictor, PlayView(layout="frames"))
        player.start("leave the house")
        while playing:
            choice = player.decide(frame)  # a PIL picture just grabbed, or a file
            press(choice.button)
            player.pressed(choice.button)
            player.prepare()  # while the game moves: the next decision then computes its own frame only

    Args:
        view: its layout is that of the predictor's collator.
        decide: scored: the probabilities of the buttons in one pass; generate: the model also writes its reason then.
        temperature: 0: the likeliest button; else one drawn from the probabilities at this temperature, with `rng`.
        write_reasons: with layout trajectory, let the model write the reasons of earlier answers, which a conversation
            contained in training. Scored decisions write them in `prepare`.

    Raises:
        PokegemmaError: the model's family has no exact cache.
    """

    def __init__(
        self,
        predictor: Predictor,
        view: PlayView,
        *,
        name: str = "model",
        decide: Decide = "scored",
        temperature: float = 0.0,
        rng: random.Random | None = None,
        write_reasons: bool = True,
    ) -> None:
        assert predictor.collator.layout == view.layout
        self.name, self.collator, self.cache = name, predictor.collator, PromptCache(predictor)
        self.history = History(view)
        self._max_new_tokens, self._generates = predictor.max_new_tokens, decide == "generate"
        self._writes_reasons = write_reasons and view.layout == "trajectory"
        self._temperature, self._rng = temperature, rng or random.Random(0)
        self.start(None)

    def start(self, goal: str | None) -> None:
        self.history.start(goal)
        self._answer: tuple[str, str] | None = None  # the button of the last decision and the answer that was written
        self._unanswered: tuple[str, ...] = ()  # buttons that were pressed, while their reason is not written
        self._written: tuple[str, list[int]] = ("", [])  # the conversation's text up to its last answer, and its tokens

    def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
        self._finish_answer()
        example = self.history.see(frame, time=time)
        _, ids = self._prompt(example)
        probabilities = self.cache.score(ids, self._pictures(example))
        button = draw_button(probabilities, temperature=self._temperature, rng=self._rng)
        if not self._generates:
            self._answer = None
            return ButtonChoice(button, probabilities, decided_by=f"model:{self.name}")
        self._answer = button, self._write_answer(example, button)
        answer = prompts.parse_answer(self._answer[1])
        return ButtonChoice(button, probabilities, answer.reasoning, answer.context, f"model:{self.name}")

    def pressed(self, *buttons: str, answer: str | None = None) -> None:
        """Record which buttons were pressed after the last decision: its own, others, or none.

        Args:
            answer: the answer to record in a conversation, as `prompts.build_output` writes it; None: the model's.
        """
        require_buttons(buttons)
        self._finish_answer()
        if self.history.view.layout != "trajectory" or self.history.asked is None or not buttons:
            self.history.pressed(*buttons)
        elif answer is None and self._answer is not None and self._answer[0] == buttons[0]:
            self._record(buttons, self._answer[1])
        elif answer is None and self._writes_reasons:
            self._unanswered = buttons
        else:
            self._record(buttons, answer or prompts.build_output(button=buttons[0], reasoning="", context=""))

    def prepare(self) -> None:
        """Write the reason of the last answer, and compute the beginning of the next prompt up to its own frame."""
        self._finish_answer()
        example = self.history.expected()
        _, ids = self._prompt(example)
        names, processor = self.history.picture_names(example), self.collator.processor
        num_known = next(number for number, name in enumerate(names) if UNSEEN in name)
        soft = [at for at, token in enumerate(ids) if token == processor.tokenizer.image_token_id]
        known = [self.history.picture(name) for name in names[:num_known]]
        self.cache.prepare(ids[: soft[num_known * processor.image_seq_length]], known)

    def _finish_answer(self) -> None:
        buttons, self._unanswered = self._unanswered, ()
        if buttons and self.history.asked is not None:
            self._record(buttons, self._write_answer(self.history.asked, buttons[0]))

    def _write_answer(self, example: Sample | Trajectory, button: str) -> str:
        """Return the answer that the model writes after a button; without a reason where it writes none that is valid.

        Generation is greedy, whatever the temperature.
        """
        tokens, tokenizer = self.collator.button_tokens, self.collator.processor.tokenizer
        begun = (*tokens.prefix, *tokens.branches[prompts.BUTTONS.index(button)])
        _, ids = self._prompt(example)
        written = self.cache.write(ids, self._pictures(example), begun, max_new_tokens=self._max_new_tokens)
        answer = read_answer(written, tokenizer)
        if answer.button == button and answer.complete and not find_control_token(answer.text):
            return answer.text
        logger.info("%s: not an answer: %r", self.name, answer.text[:80])
        return prompts.build_output(button=button, reasoning="", context="")

    def _pictures(self, example: Sample | Trajectory) -> list[Image.Image]:
        return [self.history.picture(name) for name in self.history.picture_names(example)]

    def _prompt(self, example: Sample | Trajectory) -> tuple[str, list[int]]:
        """Return a prompt's text and its tokens, as the collator writes them."""
        text, (written, ids) = self._render(self.history.messages(example)[:-1], ask=True), self._written
        if written and text.startswith(written):
            return text, ids + self.collator.tokenize_pieces([text[len(written) :]])[0]
        row = self.collator.tokenize(example)
        return text, row.ids[: row.answer_starts[-1]]

    def _record(self, buttons: tuple[str, ...], answer: str) -> None:
        """Append the last decision with its answer to the conversation."""
        asked = self.history.asked
        text, ids = self._prompt(asked)
        samples = (*asked.samples[:-1], replace(asked.samples[-1], output=answer))
        whole = self._render(prompts.build_trajectory_messages(replace(asked, samples=samples)), ask=False)
        self._written = whole, ids + self.collator.tokenize_pieces([whole[len(text) :]])[0]
        self.history.pressed(*buttons, answer=answer)

    def _render(self, messages: Sequence[dict[str, Any]], *, ask: bool) -> str:
        return self.collator.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
