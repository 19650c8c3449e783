"""A check that the prompt's text alone does not predict the button: a classifier that sees no picture."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import lgamma, log

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB

from pokegemma.data.checks.leakage import WORD, allowed_prompt, with_goals
from pokegemma.data.checks.records import Check, Split, percent, skipped
from pokegemma.data.prompts import answer_button

PROBE_LIMIT = 20_000
"""Samples a split that the probe reads, at random; more change its accuracy by less than a point."""

SIGNIFICANCE = 0.05
"""One-sided: a probe without any advantage fails the dataset in at most 5 % of datasets."""

_NUM_FOLDS = 5
_PROBE, _ALLOWED = "probe", "probe on goal and earlier buttons"
_SMOOTHING = 0.1


@dataclass(frozen=True)
class _Probed:
    """The parts of a sample that the probe and the baselines use."""

    session: str
    prompt: str
    allowed: str
    previous: str | None
    button: str


def _draw(split: Split, *, seed: int) -> list[_Probed]:
    """Return the samples of a split, or `PROBE_LIMIT` of them drawn at random, in file order."""
    generator, drawn = random.Random(seed), []
    for number, (_, sample, goal) in enumerate(with_goals(split.located())):
        place = number if number < PROBE_LIMIT else generator.randrange(number + 1)
        if place >= PROBE_LIMIT or (button := answer_button(sample.output)) is None:
            continue
        previous = sample.previous_buttons[-1] if sample.previous_buttons else None
        probed = _Probed(
            sample.session, f"{sample.context}\n{sample.question}", allowed_prompt(sample, goal), previous, button
        )
        if place < len(drawn):
            drawn[place] = probed
        else:
            drawn.append(probed)
    return drawn


def _naive_bayes(texts: Sequence[str], buttons: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the predicted button of each text that is in the second half of a fold, "" for the others."""
    counts = CountVectorizer(token_pattern=WORD.pattern, ngram_range=(1, 2)).fit_transform(texts)
    predicted = np.full(len(texts), "", dtype=object)
    for train, test in folds:
        known = np.flatnonzero(np.asarray(counts[train].sum(axis=0)).ravel())
        if not len(known):  # no word to learn from: scikit-learn raises here, so the majority is predicted
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
    """Fail if naive Bayes on the prompt's text, predicts buttons better than goal and earlier buttons do.

    The probe (words and pairs of words, as counts) is trained on train and tested on eval. Eval alone is often too
    small to distinguish 57 % from 45 %, so train is predicted as well, in five folds of whole sessions, and the result
    is about all of these predictions.

    A prompt may contain the goal and the earlier buttons. These alone may predict a lot (`select` follows `start`), so
    the dataset fails if the probe is better than the same probe on a prompt rewritten from these alone, by an exact
    one-sided McNemar test at 5 %. Repeat-previous and a first-order Markov chain are shown for comparison.
    """
    name = "text-only probe"
    probed = _draw(train, seed=seed)
    num_train = len(probed)
    probed += _draw(held_out, seed=seed)
    if not num_train or num_train == len(probed):
        return skipped(name, "no answer in train or none in eval parses")
    if not any(WORD.search(sample.prompt) for sample in probed):
        return skipped(name, "no prompt contains a word")
    buttons = np.array([sample.button for sample in probed], dtype=object)
    folds = _folds(probed, num_train, seed=seed)
    tested = np.concatenate([test for _, test in folds])
    right = {who: predicted == buttons for who, predicted in _predict(probed, buttons, folds).items()}
    details, shares, p_values = [], [], {}
    for who, hits in right.items():
        num_eval, num_all = int(hits[num_train:].sum()), int(hits[tested].sum())
        shares.append(f"{who} {percent(num_all, len(tested))}")
        line = f"{who}: {percent(num_eval, len(probed) - num_train)} of {len(probed) - num_train} eval, "
        line += f"{percent(num_all, len(tested))} of all {len(tested)}"
        if who != _PROBE:
            p_values[who] = advantage_p_value(right[_PROBE][tested], hits[tested])
            line += f" (p = {p_values[who]:.2g} that the probe is no better)"
        details.append(line)
    summary = ", ".join(shares)
    if p_values[_ALLOWED] <= SIGNIFICANCE:
        return Check(name, "FAIL", f"the prompt gives the button away: {summary}", tuple(details))
    return Check(name, "PASS", summary, tuple(details))


def _predict(
    probed: Sequence[_Probed], buttons: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    repeated, chained = _baselines(probed, folds)
    return {
        _PROBE: _naive_bayes([sample.prompt for sample in probed], buttons, folds),
        "repeat-previous": repeated,
        "Markov": chained,
        _ALLOWED: _naive_bayes([sample.allowed for sample in probed], buttons, folds),
    }
