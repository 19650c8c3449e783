"""Does the prompt give the answer away? Four looks: is it what `prompts` writes, its words, a classifier, the history.

The original's prompts held the reasoning and observations of the very turn to be predicted.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import lgamma, log

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB

from pokegemma.data.checks.records import NO_SAMPLES, Check, Split, percent, skipped
from pokegemma.data.prompts import AnswerError, answer_button, build_context, build_question, is_context, parse_answer
from pokegemma.data.samples import Sample

MAX_LEAK_SHARE = 0.01
"""Coincidence: above this share of samples, target text in the prompt is a leak."""

RUN_WORDS = 5
"""So many words in a row shared by a reasoning and its prompt are no coincidence."""

MIN_SPECIFIC_LETTERS = 8
"""A reasoning of one word counts only if it is at least this long: "menu" is anywhere."""

PROBE_LIMIT = 20_000
"""Samples a split that the probe reads, at random; more change its accuracy by less than a point."""

SIGNIFICANCE = 0.05
"""One-sided: a probe without any advantage fails the dataset in at most 5 % of datasets."""

_NUM_FOLDS = 5
_SMOOTHING = 0.1
_WORD = re.compile(r"[^\W_]+")


def _words(text: str) -> str:
    """Return the lower-case words of `text` between single spaces, so that `in` matches whole words in a row."""
    return " ".join(["", *_WORD.findall(text.lower()), ""])


def _allowed_prompt(sample: Sample, goal: str | None) -> str:
    """Return what a prompt may say: the rules, the session's goal, the earlier buttons."""
    return f"{build_context(goal)}\n{build_question(sample.previous_buttons)}"


def _with_goals(samples: Iterable[tuple[str, Sample]]) -> Iterator[tuple[str, Sample, str | None]]:
    """Yield (where, sample, goal): what its session's first sample gives as the goal.

    A session has one goal; a text that changes from turn to turn is not one, whatever it is called.
    """
    goals: dict[str, str | None] = {}
    for where, sample in samples:
        goal = sample.metadata.get("goal")
        yield where, sample, goals.setdefault(sample.session, goal if isinstance(goal, str) else None)


def _prompt_problem(sample: Sample, goal: str | None) -> str | None:
    if sample.metadata.get("goal") != goal:
        return "metadata.goal is not that of its session's first sample"
    is_right = {
        "context": is_context(sample.context, goal),
        "question": sample.question == build_question(sample.previous_buttons),
    }
    names = [name for name, right in is_right.items() if not right]
    return f"{' and '.join(names)} not as metadata.goal and metadata.previous_buttons make them" if names else None


def check_prompts(splits: Iterable[Split]) -> Check:
    """Fail if more than `MAX_LEAK_SHARE` of the prompts are not what `prompts` builds of goal and earlier buttons.

    An exact check, so that a leak in every tenth prompt or in other words than the answer's is found, too.
    """
    details, num_samples = [], 0
    for split in splits:
        for where, sample, goal in _with_goals(split.located()):
            num_samples += 1
            if problem := _prompt_problem(sample, goal):
                details.append(f"{where} ({sample.id}): {problem}")
    if not num_samples:
        return skipped("prompts", NO_SAMPLES)
    if not details:
        return Check("prompts", "PASS", f"{num_samples} prompts say the goal and the earlier buttons, nothing else")
    status = "FAIL" if len(details) > MAX_LEAK_SHARE * num_samples else "WARN"
    summary = f"{len(details)} of {num_samples} prompts say something else than goal and earlier buttons"
    return Check("prompts", status, f"{summary} ({percent(len(details), num_samples)})", tuple(details))


def leaked_words(sample: Sample, goal: str | None) -> str | None:
    """Return words of the sample's own reasoning that its prompt holds and neither rules nor goal explain, or None."""
    try:
        reasoning = _words(parse_answer(sample.output).reasoning)
    except AnswerError:
        return None
    words = reasoning.split()
    if not words or (len(words) == 1 and len(words[0]) < MIN_SPECIFIC_LETTERS):
        return None
    prompt = _words(f"{sample.context}\n{sample.question}")
    size = min(RUN_WORDS, len(words))
    runs = [f" {' '.join(words[at : at + size])} " for at in range(len(words) - size + 1)]
    found = [run for run in runs if run in prompt]
    if not found:
        return None
    allowed = _words(f"{_allowed_prompt(sample, goal)}\n{goal or ''}")  # the prompt's own goal may be cut
    return next((run.strip() for run in found if run not in allowed), None)


def check_target_text(splits: Iterable[Split]) -> Check:
    """Fail if more than `MAX_LEAK_SHARE` of the prompts hold words of the reasoning to be written; warn at any."""
    details, num_samples = [], 0
    for split in splits:
        for where, sample, goal in _with_goals(split.located()):
            num_samples += 1
            if words := leaked_words(sample, goal):
                details.append(f"{where} ({sample.id}): its prompt says {words!r}, as its own reasoning does")
    summary = f"{len(details)} of {num_samples} prompts hold their own answer's reasoning"
    if not num_samples:
        return skipped("target text in prompt", NO_SAMPLES)
    if not details:
        return Check("target text in prompt", "PASS", summary)
    status = "FAIL" if len(details) > MAX_LEAK_SHARE * num_samples else "WARN"
    return Check("target text in prompt", status, f"{summary} ({percent(len(details), num_samples)})", tuple(details))


def check_history(splits: Iterable[Split]) -> Check:
    """Fail if a sample's earlier buttons do not end with what the turn before it pressed.

    A list that is one turn ahead holds the answer. Only samples whose turn before is the preceding sample of the
    file can be compared.
    """
    details, num_compared = [], 0
    for split in splits:
        before: Sample | None = None
        for where, sample in split.located():
            previous, before = before, sample
            if previous is None or previous.session != sample.session:
                continue
            if sample.metadata["turn"] != previous.metadata["turn"] + 1:
                continue
            num_compared += 1
            button = answer_button(previous.output)
            pressed = previous.metadata.get("buttons") or [button]
            expected = [*previous.previous_buttons, *pressed][-len(sample.previous_buttons) or None :]
            if button is not None and sample.previous_buttons != expected:
                details.append(
                    f"{where} ({sample.id}): earlier buttons {', '.join(sample.previous_buttons) or 'none'}; "
                    f"the samples before say {', '.join(expected)}"
                )
    if not num_compared:
        return skipped("earlier buttons", "no sample follows the turn before it")
    summary = f"{len(details)} of {num_compared} samples disagree with the turn before them"
    return Check("earlier buttons", "FAIL" if details else "PASS", summary, tuple(details))


@dataclass(frozen=True)
class _Probed:
    """What the probe and the baselines need of a sample."""

    session: str
    prompt: str
    allowed: str
    previous: str | None
    button: str


def _draw(split: Split, *, seed: int) -> list[_Probed]:
    """Return the samples of a split, or `PROBE_LIMIT` of them drawn at random, in file order."""
    generator, drawn = random.Random(seed), []
    for number, (_, sample, goal) in enumerate(_with_goals(split.located())):
        place = number if number < PROBE_LIMIT else generator.randrange(number + 1)
        if place >= PROBE_LIMIT or (button := answer_button(sample.output)) is None:
            continue
        previous = sample.previous_buttons[-1] if sample.previous_buttons else None
        probed = _Probed(
            sample.session, f"{sample.context}\n{sample.question}", _allowed_prompt(sample, goal), previous, button
        )
        if place < len(drawn):
            drawn[place] = probed
        else:
            drawn.append(probed)
    return drawn


def _naive_bayes(texts: Sequence[str], buttons: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the predicted button of each text that is in the second half of a fold, "" for the others."""
    counts = CountVectorizer(token_pattern=_WORD.pattern, ngram_range=(1, 2)).fit_transform(texts)
    predicted = np.full(len(texts), "", dtype=object)
    for train, test in folds:
        known = np.flatnonzero(np.asarray(counts[train].sum(axis=0)).ravel())
        if not len(known):  # no word to learn from: scikit-learn raises, a classifier falls back on the majority
            predicted[test] = Counter(buttons[train]).most_common(1)[0][0]
            continue
        classifier = MultinomialNB(alpha=_SMOOTHING).fit(counts[train][:, known], buttons[train])
        predicted[test] = classifier.predict(counts[test][:, known])
    return predicted


def _baselines(probed: Sequence[_Probed], folds: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the predictions of repeat-previous and of a first-order Markov chain fitted on each fold."""
    repeated, chained = np.full((2, len(probed)), "", dtype=object)
    for train, test in folds:
        followers: defaultdict[str | None, Counter[str]] = defaultdict(Counter)
        for at in train:
            followers[probed[at].previous][probed[at].button] += 1
        majority = sum(followers.values(), Counter()).most_common(1)[0][0]
        for at in test:
            previous = probed[at].previous
            repeated[at] = previous or majority
            chained[at] = followers[previous].most_common(1)[0][0] if followers.get(previous) else majority
    return repeated, chained


def _folds(probed: Sequence[_Probed], num_train: int, *, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (train, test) indices: eval predicted from train, then train itself in folds of whole sessions."""
    train, held_out = np.arange(num_train), np.arange(num_train, len(probed))
    sessions = sorted({sample.session for sample in probed[:num_train]})
    random.Random(seed).shuffle(sessions)
    fold_of = {session: at % _NUM_FOLDS for at, session in enumerate(sessions)}
    numbers = np.array([fold_of[sample.session] for sample in probed[:num_train]])
    folds = [(train, held_out)]
    if len(sessions) > 1:
        folds += [(train[numbers != fold], train[numbers == fold]) for fold in sorted(set(fold_of.values()))]
    return folds


def advantage_p_value(better: np.ndarray, worse: np.ndarray) -> float:
    """Return the exact one-sided McNemar p-value that one predictor is right more often than another.

    Args:
        better, worse: (N,) bool, whether each was right on the same N samples.

    Only samples on which they disagree count: P(at least so many wins of n, each with probability 1/2).
    """
    num_wins, num_losses = int((better & ~worse).sum()), int((worse & ~better).sum())
    total = num_wins + num_losses
    terms = [
        lgamma(total + 1) - lgamma(wins + 1) - lgamma(total - wins + 1) - total * log(2)
        for wins in range(num_wins, total + 1)
    ]
    return min(1.0, float(np.exp(terms).sum()))


def check_text_probe(train: Split, held_out: Split, *, seed: int = 0) -> Check:
    """Fail if naive Bayes on the prompt's text, which sees no picture, beats what a player may know.

    The probe (words and pairs of words, as counts) is trained on train and tested on eval. Eval alone is often too
    small to tell 57 % from 45 %, so train is predicted as well, in five folds of whole sessions, and the verdict is
    about all of these predictions.

    A prompt may say the goal and the earlier buttons, and these may predict a lot (after `start` comes `select`), so
    the dataset fails if the probe is better than the same probe on a prompt rewritten from these alone, by an exact
    one-sided McNemar test at 5 %. Repeat-previous and a first-order Markov chain are shown for comparison.
    """
    name = "text-only probe"
    probed = _draw(train, seed=seed)
    num_train = len(probed)
    probed += _draw(held_out, seed=seed)
    buttons = np.array([sample.button for sample in probed], dtype=object)
    if not num_train or num_train == len(probed):
        return skipped(name, "no answer in train or none in eval parses")
    if not any(_WORD.search(sample.prompt) for sample in probed):
        return skipped(name, "no prompt holds a word")
    folds = _folds(probed, num_train, seed=seed)
    tested = np.concatenate([test for _, test in folds])
    repeated, chained = _baselines(probed, folds)
    predictions = {
        "probe": _naive_bayes([sample.prompt for sample in probed], buttons, folds),
        "repeat-previous": repeated,
        "Markov": chained,
        "probe on goal and earlier buttons": _naive_bayes([sample.allowed for sample in probed], buttons, folds),
    }
    right = {who: (predicted == buttons)[tested] for who, predicted in predictions.items()}
    held_out_right = {who: (predicted == buttons)[num_train:] for who, predicted in predictions.items()}
    p_values = {who: advantage_p_value(right["probe"], other) for who, other in right.items() if who != "probe"}
    details = tuple(
        f"{who}: {percent(int(held_out_right[who].sum()), len(probed) - num_train)} of {len(probed) - num_train} eval, "
        f"{percent(int(hits.sum()), len(tested))} of all {len(tested)}"
        + (f" (p = {p_values[who]:.2g} that the probe is no better)" if who in p_values else "")
        for who, hits in right.items()
    )
    shares = ", ".join(f"{who} {percent(int(hits.sum()), len(tested))}" for who, hits in right.items())
    if p_values["probe on goal and earlier buttons"] <= SIGNIFICANCE:
        return Check(name, "FAIL", f"the prompt gives the button away: {shares}", details)
    return Check(name, "PASS", shares, details)
