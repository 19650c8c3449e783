"""Decisions as questions to an engine: the prompt of training, and pictures that need no resizing."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pokegemma.data import prompts
from pokegemma.data.frame_pictures import open_picture
from pokegemma.data.prompts import Layout
from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import Trajectory


@dataclass(frozen=True)
class Question:
    """A decision to make.

    `messages` is the conversation up to the answer, for a chat template, with a slot {"type": "image"} for each of
    `pictures`. Pictures are RGB and have the size of the model's input, so that every engine gets the same pixels:
    transformers stretches a frame, while llama.cpp would keep its proportions and add black bars.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    pictures: tuple[Image.Image, ...]

    def openai_messages(self) -> list[dict[str, Any]]:
        """Return the conversation as OpenAI's API takes it, the pictures in it as data URLs."""
        urls = iter([_data_url(picture) for picture in self.pictures])
        return [
            {
                "role": message["role"],
                "content": [
                    {"type": "image_url", "image_url": {"url": next(urls)}} if part["type"] == "image" else part
                    for part in message["content"]
                ],
            }
            for message in self.messages
        ]


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_picture(path: Path, *, size_px: int) -> Image.Image:
    """Return a picture stretched to a square of `size_px`, as Gemma 3's processor does it.

    Raises:
        PokegemmaError: it cannot be read.
    """
    return open_picture(path).resize((size_px, size_px), Image.Resampling.BILINEAR)


def shown(example: Sample | Trajectory, layout: Layout) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Return the conversation with its last answer, and its pictures as paths relative to the dataset.

    Raises:
        PokegemmaError: the sample has no picture for this layout.
    """
    if isinstance(example, Trajectory):
        return prompts.build_trajectory_messages(example), prompts.trajectory_images(example)
    return prompts.build_messages(example, layout), prompts.sample_images(example, layout)


def build_questions(
    examples: Iterable[Sample | Trajectory], *, layout: Layout, dataset_folder: Path, size_px: int
) -> list[Question]:
    """Return a question for each sample; for a trajectory its last decision, after the recorded ones before it.

    Raises:
        PokegemmaError: a picture is missing or damaged, or a sample has none for this layout.
    """
    questions = []
    for example in examples:
        messages, paths = shown(example, layout)
        pictures: Sequence[Image.Image] = [read_picture(dataset_folder / path, size_px=size_px) for path in paths]
        name = example.samples[-1].id if isinstance(example, Trajectory) else example.id
        questions.append(Question(id=name, messages=tuple(messages[:-1]), pictures=tuple(pictures)))
    return questions
