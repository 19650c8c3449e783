"""Predict the decisions of trajectories: in a conversation with a cache, a decision costs its own frame only."""

import itertools
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tqdm import tqdm

from pokegemma.data.trajectories import Trajectory
from pokegemma.evaluation.predict import Predictions, Predictor, read_answer
from pokegemma.gemma.button_scores import checked_scores, encoded_pictures
from pokegemma.gemma.cached_conversation import Conversation
from pokegemma.gemma.families import stop_tokens


def predict_trajectories(
    predictor: Predictor, trajectories: Sequence[Trajectory], *, generate: bool = True
) -> Predictions:
    """Predict every counted decision, given the recorded answers to the decisions before it.

    The latency of a decision includes reading and encoding its new frame and the turn before it, not the session so
    far.
    """
    answers, scores = [], []
    latency_s: dict[str, list[float]] = {"generated": [], "scored": []} if generate else {"scored": []}
    num_decisions = sum(len(trajectory.counted) for trajectory in trajectories)
    with tqdm(total=num_decisions, desc="evaluate", unit="decision") as progress:
        for trajectory in trajectories:
            for number, (conversation, turn_s) in enumerate(_conversations(predictor, trajectory)):
                if number < trajectory.num_context:
                    continue
                began = time.perf_counter()
                scores.append(checked_scores(conversation.score_buttons(predictor.collator.button_tokens)))
                latency_s["scored"].append(turn_s + time.perf_counter() - began)
                if generate:
                    began = time.perf_counter()
                    tokenizer = predictor.collator.processor.tokenizer
                    stops = stop_tokens(tokenizer)
                    written = conversation.generate(stops=stops, max_new_tokens=predictor.max_new_tokens)
                    answers.append(read_answer(written, tokenizer))
                    latency_s["generated"].append(turn_s + time.perf_counter() - began)
                progress.update()
    return Predictions(answers if generate else None, np.stack(scores), latency_s)


def _conversations(predictor: Predictor, trajectory: Trajectory) -> Iterator[tuple[Conversation, float]]:
    """Yield the conversation before every answer of a trajectory, and the seconds that the new turn took."""
    collator, conversation = predictor.collator, Conversation(predictor.model)
    row = collator.tokenize(trajectory)
    boundaries = [0, *row.answer_starts]
    image_token = collator.processor.tokenizer.image_token_id
    paths = list(collator.picture_paths(trajectory))
    for start, end in itertools.pairwise(boundaries):
        began = time.perf_counter()
        ids = row.ids[start:end]  # the answer before, and the new turn
        num_new = ids.count(image_token) // collator.processor.image_seq_length
        new, paths = paths[:num_new], paths[num_new:]
        batch = {name: value.to(predictor.model.device) for name, value in collator.read_paths(new).items()}
        with torch.inference_mode():
            pictures = encoded_pictures(predictor.model, batch)
        conversation.say(ids, collator.token_types(torch.tensor(ids)), pictures)
        yield conversation, time.perf_counter() - began
