"""What llama.cpp's converter reads in a checkpoint's folder, and transformers 5 no longer writes there."""

import json
from pathlib import Path

from transformers import Gemma3Processor, ProcessorMixin

from pokegemma.training.stored_weights import plain_name


def published_name(name: str) -> str:
    """Return what published Gemma 3 checkpoints call a tensor, which is what llama.cpp and mlx-vlm read.

    transformers 5 saves other names in three cases: a checkpoint-N of full fine-tuning (`model.vision_tower...`), a
    model built from its config (`vision_tower.embeddings...`), and full fine-tuning under DeepSpeed ZeRO-3
    (`language_model.model.model.layers...`).

    Example:
        >>> published_name("model.language_model.layers.0.mlp.up_proj.weight")
        'language_model.model.layers.0.mlp.up_proj.weight'
    """
    plain = plain_name(name)
    part, _, rest = plain.partition(".")
    if part == "lm_head":
        return f"language_model.{plain}"
    if part == "vision_tower":
        return f"vision_tower.vision_model.{rest}"
    return plain if part == "multi_modal_projector" else f"language_model.model.{plain}"


def write_converter_files(processor: ProcessorMixin, folder: Path) -> None:
    """Add to a saved checkpoint what converting it to GGUF takes beside tokenizer.model.

    - preprocessor_config.json: newer converters read processor_config.json, others know this one only.
    - `added_tokens_decoder` in tokenizer_config.json: it tells control tokens from text. Without it <start_of_turn>
      becomes plain text, which llama.cpp cuts into letters, in every prompt.

    Of other families than Gemma 3 nothing is converted here, so their files stay as they are.
    """
    if not isinstance(processor, Gemma3Processor):
        return
    processor.image_processor.save_pretrained(folder)
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {str(token.pop("id")): token for token in added}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
