"""The conversations of samples as the chat template writes them, for a person to read."""

from collections.abc import Iterable, Iterator, Sequence

from tqdm import tqdm

from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import DEFAULT_MAX_DECISIONS, DEFAULT_OVERLAP, Trajectory, cut_trajectories
from pokegemma.gemma.batches.processor_collator import Collator

_Parts = list[tuple[str, list[str]]]


def conversation_texts(collator: Collator, samples: Sequence[Sample]) -> dict[str, _Parts]:
    """Return, by sample, the text of its conversation in parts: ("prompt", [text]), ("answer", [text]) ...

    The text is exact, but for each picture's mark, which the processor replaces by soft tokens. A sample of a
    trajectory has all that comes before it in its stretch.

    Raises:
        PokegemmaError: a text contains a control token, or the template does not belong to the model.
    """
    texts = {}
    for example in tqdm(_examples(collator, samples), desc="writing conversations", unit="conversation"):
        names = ("prompt", "answer")
        parts = [(names[place % 2], [piece]) for place, piece in enumerate(collator.text_pieces(example))]
        counted = example.counted if isinstance(example, Trajectory) else (example,)
        num_context = example.num_context if isinstance(example, Trajectory) else 0
        for place, sample in enumerate(counted, start=num_context):
            texts[sample.id] = parts[: 2 * place + 2]
    return texts


def _examples(collator: Collator, samples: Sequence[Sample]) -> Iterable[Sample | Trajectory]:
    if collator.layout != "trajectory":
        return samples
    stretches: Iterator[Trajectory] = cut_trajectories(
        samples, max_decisions=DEFAULT_MAX_DECISIONS, overlap=DEFAULT_OVERLAP
    )
    return list(stretches)
