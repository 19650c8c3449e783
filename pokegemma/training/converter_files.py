"""What llama.cpp's converter reads in a checkpoint's folder, and transformers 5 no longer writes there."""

import json
from pathlib import Path

from transformers import Gemma3Processor, ProcessorMixin


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
