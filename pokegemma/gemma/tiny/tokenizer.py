"""A tiny SentencePiece tokenizer with Gemma's control symbols, and the chat template that goes with it."""

import io
import random
from pathlib import Path

import sentencepiece
from transformers import GemmaTokenizer

from pokegemma.data import prompts
from pokegemma.gemma.text.tokenizer_files import write_tokenizer_files

CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
"""What Gemma 3's published template writes for user and model turns."""

_CONTROL_SYMBOLS = ["<mask>", "[multimodal]", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"]
PICTURE_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
"""Of Gemma 3, by transformers' names."""

_NEWLINES = ["\n" * count for count in range(1, 5)]
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_VOCABULARY_SIZE = 1024
_CORPUS_PHRASES = (
    "the path leads up down left right, the way is blocked, open the menu and close it, read the sign, talk to the "
    "nurse, heal at the Pokemon center, find the gym, leave the city, go north, go south, go east, go west, enter the "
    "door, a battle starts, use the strongest move, select a menu item, advance the dialogue, continue the dialogue"
)
_CONTEXTS = ("navigation", "battle", "menu", "dialogue", "pokemon_center", "overworld", "interaction", "building")


def _corpus(seed: int) -> list[str]:
    """Return text to train the tiny tokenizer on: our own prompts and answers with varied goals and reasons."""
    generator = random.Random(seed)
    words = _CORPUS_PHRASES.replace(",", "").split()
    lines = []
    for _ in range(400):
        phrase = " ".join(generator.choices(words, k=generator.randint(1, 8)))
        letters = "".join(generator.choices(_LETTERS, k=6))
        goal = generator.choice([phrase, f"{phrase} {letters}", phrase.replace(" ", "_")])
        previous = generator.choices(prompts.BUTTONS, k=generator.randint(0, prompts.MAX_PREVIOUS_BUTTONS))
        lines.append(prompts.build_context(goal))
        lines.append(prompts.build_question(previous))
        button, context = generator.choice(prompts.BUTTONS), generator.choice(_CONTEXTS)
        lines.append(prompts.build_output(button=button, reasoning=phrase, context=context))
    return [piece for line in lines for piece in line.split("\n")]


def train_tokenizer(
    folder: Path, *, seed: int, control_symbols: list[str] = _CONTROL_SYMBOLS, tokens: dict[str, str] = PICTURE_TOKENS
) -> GemmaTokenizer:
    """Write a tiny SentencePiece tokenizer to `folder` and return it.

    As the published ones, it adds a BOS to every text; see `write_tokenizer_files`.

    Args:
        control_symbols: part of SentencePiece's vocabulary.
        tokens: special tokens by transformers' names; those that are no control symbols get the ids that follow.
    """
    model = io.BytesIO()  # not files: their paths would be kept in tokenizer.model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus(seed)),
        model_writer=model,
        model_type="bpe",
        vocab_size=_VOCABULARY_SIZE,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=[*control_symbols, *_NEWLINES],
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return write_tokenizer_files(folder, is_text=_NEWLINES.__contains__, tokens=tokens)
