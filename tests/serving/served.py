"""A tiny model that answers "up" to a red picture and "down" to a blue one, so its use of pictures shows."""

import json
from pathlib import Path

import torch
from PIL import Image

from pokegemma.data import prompts
from pokegemma.data.samples import Sample, read_samples
from pokegemma.gemma.batches.processor_collator import make_collator
from pokegemma.gemma.checkpoint_files import write_converter_files
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3

SIZE_PX = 112
BUTTON_OF = {"red": "up", "blue": "down"}


def write_colour_dataset(folder: Path) -> Path:
    """Write a dataset of one decision for each colour, and return its folder."""
    folder.mkdir()
    lines = []
    for colour, button in BUTTON_OF.items():
        Image.new("RGB", (SIZE_PX, SIZE_PX), colour).save(folder / f"{colour}.png")
        sample = Sample(
            id=f"session/{colour}",
            frames=(f"{colour}.png",),
            image=f"{colour}.png",
            context=prompts.build_context("leave the city"),
            question=prompts.build_question(["up", "a"]),
            output=json.dumps({"button": button}),
            metadata={"session": "session", "turn": 1, "previous_buttons": ["up", "a"]},
        )
        lines.append(sample.to_json())
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_colour_model(folder: Path, dataset: Path) -> None:
    """Write a tiny Gemma 3 trained until it reproduces `dataset`: about forty steps, two seconds."""
    make_tiny_gemma3(folder, image_size_px=SIZE_PX, num_image_tokens=64, sliding_window=128)
    model, processor = open_checkpoint(folder).load_model().train(), open_checkpoint(folder).processor
    collator = make_collator(processor, layout="grid", dataset_folder=dataset)
    batch = collator(list(read_samples(dataset / "train.jsonl")))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(400):  # rounding differs between machines, and with it the number of steps
        loss = model(**batch).loss
        if loss.item() < 0.005:
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.005, loss
    model.eval().save_pretrained(folder)
    write_converter_files(processor, folder)
