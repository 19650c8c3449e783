"""Load checkpoints of Gemma 3, 3n and 4, and make a tiny Gemma 3 with every part of the real ones."""

import hashlib
import io
import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GemmaTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    set_seed,
)
from transformers.utils import cached_file

from pokegemma.data import prompts
from pokegemma.errors import PokegemmaError
from pokegemma.training.families import (
    FAMILIES,
    Family,
    attention_of_parts,
    find_family,
    require_exact,
    require_packages,
)
from pokegemma.training.image_attention import ImageAttention, change_config, change_processor, image_attention
from pokegemma.training.image_size import resize_config, resize_model, resize_processor
from pokegemma.training.processors import Gemma4PictureProcessor, load_gemma3n_processor
from pokegemma.training.vision import accept_compact_batches

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16"]

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
_PICTURE_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
_NEWLINES = ["\n" * count for count in range(1, 5)]
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_VOCABULARY_SIZE = 1024
_CORPUS_PHRASES = (
    "the path leads up down left right, the way is blocked, open the menu and close it, read the sign, talk to the "
    "nurse, heal at the Pokemon center, find the gym, leave the city, go north, go south, go east, go west, enter the "
    "door, a battle starts, use the strongest move, select a menu item, advance the dialogue, continue the dialogue"
)
_CONTEXTS = ("navigation", "battle", "menu", "dialogue", "pokemon_center", "overworld", "interaction", "building")


def default_device() -> torch.device:
    """Return the device a single process uses: CUDA, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _load(what: str, path: str | Path, function: Any, **options: Any) -> Any:
    local = Path(path).is_dir()
    if not local and (str(path).startswith((".", "/")) or str(path).count("/") > 1):
        raise PokegemmaError(
            f"{path}: no such folder (a model is a folder or a Hugging Face id like google/gemma-3-4b-it)"
        )
    try:
        return function(str(path), **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        hint = "" if local else "; a gated model needs its licence accepted on the Hub and HUGGINGFACE_TOKEN in .env"
        raise PokegemmaError(
            f"{path}: the {what} could not be loaded: {' '.join(str(error).split())[:300]}{hint}"
        ) from error


def read_family(path: str | Path) -> Family:
    """Return the family of a checkpoint with vision, from its config alone.

    Raises:
        PokegemmaError: there is no config at `path`, or it is of another architecture.
    """
    config = _load("config", path, PreTrainedConfig.get_config_dict)[0]
    if not config:
        raise PokegemmaError(f"{path}: no config.json in it, so it is no model")
    return find_family(config.get("model_type"), where=str(path))


def load_config(
    path: str | Path, image_size_px: int | None = None, attention: ImageAttention | None = None
) -> PreTrainedConfig:
    """Return the config of a Gemma 3, 3n or 4 with vision.

    Args:
        image_size_px: of its pictures; None: its own.
        attention: inside pictures; None: its own.

    Raises:
        PokegemmaError: there is none at `path`, it is of another architecture, needs packages that are missing, the
            size does not fit, or the attention contradicts its own.
    """
    require_packages(read_family(path), where=str(path))
    config = _load("config", path, AutoConfig.from_pretrained)
    if image_size_px is not None:
        require_exact(config, "--image_size")
        resize_config(config, image_size_px)
    if attention is not None:
        require_exact(config, "--image_attention")
        change_config(config, attention)
    return config


def _processor_loader(path: str | Path) -> Callable[[str], Any]:
    """Return what loads the processor of a checkpoint, or that in the folder of an adapter, which has no config."""
    if (Path(path) / "adapter_config.json").is_file():
        name = _load("processor", path, ProcessorMixin.get_processor_dict)[0].get("processor_class")
    else:
        name = read_family(path).processor
    return {"Gemma3nProcessor": load_gemma3n_processor, "Gemma4Processor": Gemma4PictureProcessor.from_pretrained}.get(
        name, Gemma3Processor.from_pretrained
    )


def load_processor(path: str | Path, image_size_px: int | None = None, attention: ImageAttention | None = None) -> Any:
    """Return the processor of a checkpoint, with the PIL image processor (torchvision is optional).

    An adapter's folder has its own, which says the size of its pictures and the attention inside them.

    Raises:
        PokegemmaError: it could not be loaded, or has no chat template.
    """
    config, changed = None, image_size_px is not None or attention is not None
    is_adapter = (Path(path) / "adapter_config.json").is_file()
    if not is_adapter and (changed or read_family(path) is FAMILIES["gemma3"]):
        config = load_config(path, image_size_px, attention)
    processor = _load("processor", path, _processor_loader(path))
    if isinstance(processor, Gemma3Processor):
        # Not as an argument of from_pretrained: it would end up in the tokenizer's config, which could not be saved.
        processor.image_processor = _load("image processor", path, Gemma3ImageProcessorPil.from_pretrained)
    if not processor.chat_template:
        raise PokegemmaError(f"{path}: the processor has no chat template; take an instruction-tuned (-it) checkpoint")
    if config is not None and image_size_px is not None:
        resize_processor(processor, config)
    if config is not None:  # config.json decides: the tokenizer's files may be copies of another model's
        change_processor(processor, image_attention(config))
    return processor


def load_model(
    path: str | Path,
    *,
    image_size_px: int | None = None,
    attention: ImageAttention | None = None,
    dtype: Dtype = "float32",
    device: torch.device | str | None = None,
    attn_implementation: str = "sdpa",
    **options: Any,
) -> PreTrainedModel:
    """Return a checkpoint in eval mode, on `device` (None: left where transformers puts it).

    Its pictures have `image_size_px` (None: the checkpoint's own size); the position embeddings are interpolated.
    `attention` inside pictures is what its config will say (None: its own); the batches of a collator bring it about.
    `options` go to `from_pretrained` (a quantization_config, say).

    Raises:
        PokegemmaError: it could not be loaded, the size does not fit, or attention would be wrong.
    """
    implementation = attention_of_parts(load_config(path, image_size_px, attention), attn_implementation)
    model = _load(
        "model", path, AutoModelForImageTextToText.from_pretrained,
        dtype=getattr(torch, dtype), attn_implementation=implementation, **options,
    )  # fmt: skip
    if image_size_px is not None:
        resize_model(model, image_size_px)
    if attention is not None:
        change_config(model.config, attention)
    if device is not None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:  # CUDA's out of memory is a RuntimeError
            raise PokegemmaError(f"{path} does not go to {device}: {str(error).splitlines()[0]}") from error
    if isinstance(model, Gemma3ForConditionalGeneration):
        accept_compact_batches(model)
    return model.eval()


def weights_fingerprint(path: str | Path) -> str:
    """Return a hash that tells checkpoints apart: all names and shapes, all vectors, and the first row of each matrix.

    A row and not the whole, so that a fingerprint of a 4B takes a second, not a minute; merging an adapter changes it.

    Raises:
        PokegemmaError: the weights cannot be read.
    """
    files = [
        _load("weights", path, cached_file, filename="model.safetensors", _raise_exceptions_for_missing_entries=False)
    ]
    if files == [None]:  # several files, and an index that names them
        index = _load("weights", path, cached_file, filename="model.safetensors.index.json")
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        files = [_load("weights", path, cached_file, filename=name) for name in sorted(names)]
    digest = hashlib.sha256()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in sorted(weights.keys()):
                values = weights.get_slice(name)
                shape = values.get_shape()
                digest.update(f"{name}{shape}".encode())
                beginning = weights.get_tensor(name) if len(shape) < 2 else values[:1]  # a scalar has no slices
                digest.update(beginning.float().numpy().tobytes())
    return digest.hexdigest()


def copy_tokenizer_model(source: str | Path, folder: Path) -> None:
    """Copy SentencePiece's tokenizer.model, which `save_pretrained` leaves out and llama.cpp needs, into `folder`.

    Gemma 4 has none: nothing is copied.

    Raises:
        PokegemmaError: the checkpoint `source` has none, and its family does.
    """
    needed = read_family(source).has_tokenizer_model
    path = _load(
        "tokenizer.model", source, cached_file, filename="tokenizer.model",
        _raise_exceptions_for_missing_entries=needed,
    )  # fmt: skip
    if path is not None:
        shutil.copyfile(path, folder / "tokenizer.model")


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
    folder: Path, *, seed: int, control_symbols: list[str] = _CONTROL_SYMBOLS, tokens: dict[str, str] = _PICTURE_TOKENS
) -> GemmaTokenizer:
    """Write a tiny SentencePiece tokenizer to `folder` and return it.

    Args:
        control_symbols: part of SentencePiece's vocabulary.
        tokens: special tokens by transformers' names; those that are no control symbols get the ids that follow.
    """
    model = io.BytesIO()  # not files: their paths would be kept in tokenizer.model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_corpus(seed)), model_writer=model, model_type="bpe", vocab_size=_VOCABULARY_SIZE,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        unk_piece="<unk>", user_defined_symbols=[*control_symbols, *_NEWLINES], byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        character_coverage=1.0, num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = GemmaTokenizer.from_pretrained(folder, extra_special_tokens=tokens)
    tokenizer.save_pretrained(folder)
    # transformers takes every user-defined symbol of tokenizer.model for a special token, and notes the path it
    # read. Newlines are ordinary text in the published checkpoints: decoding must keep them.
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["extra_special_tokens"] = [token for token in config["extra_special_tokens"] if token not in _NEWLINES]
    for name in ("vocab_file", "is_local", "local_files_only"):
        config.pop(name, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    backend = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in backend["added_tokens"]:
        token["special"] = token["content"] not in _NEWLINES
    (folder / "tokenizer.json").write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
    return GemmaTokenizer.from_pretrained(folder)


def _published_key(key: str) -> str:
    """Return the name that published checkpoints give a weight of a Gemma 3 built from its config."""
    return key.replace("vision_tower.", "vision_tower.vision_model.", 1) if ".vision_model." not in key else key


@torch.no_grad()
def _make_teachable(model: Gemma3ForConditionalGeneration) -> None:
    """Set the random weights that adapters cannot reach to sizes from which LoRA on the others learns quickly.

    transformers' own start leaves it little: a projector of zeros makes all pictures look the same, position
    embeddings drown in the patches they are added to, and embeddings of 0.02, which are the LM head too, cannot make
    one token much likelier than the others.
    """
    width = model.config.text_config.hidden_size
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=width**-0.5)
    torch.nn.init.constant_(model.model.language_model.norm.weight, 2.0)  # a factor of 3: Gemma's norms add one
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.6)
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, std=projection.shape[0] ** -0.5)


def make_tiny_gemma3(
    folder: Path, *, seed: int = 0, image_size_px: int = 224, num_image_tokens: int = 256, sliding_window: int = 512
) -> None:
    """Write a tiny random Gemma 3 (about 2 million weights) that loads wherever the published ones do.

    It has a SentencePiece tokenizer with Gemma's control symbols and byte fallback, the chat template, SigLIP
    without a head, the projector, and six text layers of which the last has full attention. 224 px, patches of
    14 px and 256 tokens a picture are what llama.cpp and mlx-vlm assume.

    Args:
        folder: an existing folder.
        num_image_tokens: tokens a picture, the square of a divisor of `image_size_px` / 14.
        sliding_window: tokens that the five other text layers look back.
    """
    set_seed(seed)
    tokenizer = train_tokenizer(folder, seed=seed)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<end_of_turn>", "<end_of_image>")}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    config = Gemma3Config(
        text_config={
            "vocab_size": 64 * -(-len(tokenizer) // 64), "hidden_size": 128, "intermediate_size": 384,
            "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
            "query_pre_attn_scalar": 32, "sliding_window": sliding_window, "max_position_embeddings": 8192,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"], **special,
        },
        vision_config={
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
            "image_size": image_size_px, "patch_size": 14, "vision_use_head": False,
        },
        mm_tokens_per_image=num_image_tokens, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=ids["<end_of_image>"], image_token_index=tokenizer.image_token_id,
        eos_token_id=[1, ids["<end_of_turn>"]], tie_word_embeddings=True,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config)
    _make_teachable(model)
    model.generation_config = GenerationConfig(
        **{**special, "eos_token_id": [1, ids["<end_of_turn>"]]}, cache_implementation="hybrid", do_sample=False
    )
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {_published_key(key): value for key, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    image_processor = Gemma3ImageProcessorPil(
        size={"height": image_size_px, "width": image_size_px}, image_seq_length=num_image_tokens
    )
    processor = Gemma3Processor(
        image_processor=image_processor, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE,
        image_seq_length=num_image_tokens,
    )  # fmt: skip
    processor.save_pretrained(folder)
