"""Processors of Gemma 3n and Gemma 4 that need no torchvision, for which there is no build for CPUs on PyPI."""

import shutil
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    Gemma3nProcessor,
    Gemma4ImageProcessorPil,
    Gemma4Processor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    SiglipImageProcessorPil,
)
from transformers.utils import cached_file

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


class Gemma4PictureProcessor(Gemma4Processor):
    """A Gemma4Processor for text and pictures only: its processor of videos needs torchvision.

    Saving copies the files that it was loaded from, so that the settings of audio and video are not lost.
    """

    def __init__(
        self,
        image_processor: Gemma4ImageProcessorPil,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        *,
        source: str = "",
    ) -> None:
        self.source = source
        self.image_seq_length = image_processor.max_soft_tokens
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.boi_token, self.eoi_token = tokenizer.boi_token, tokenizer.eoi_token
        self.video_token = self.audio_token = None
        self.boa_token = self.eoa_token = ""  # None is refused, even without audio
        # Not that of Gemma4Processor, which requires the processors of audio and video.
        ProcessorMixin.__init__(self, image_processor=image_processor, tokenizer=tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> "Gemma4PictureProcessor":
        tokenizer = AutoTokenizer.from_pretrained(path)
        template_path = cached_file(path, "chat_template.jinja", _raise_exceptions_for_missing_entries=False)
        template = Path(template_path).read_text(encoding="utf-8") if template_path else tokenizer.chat_template
        images = Gemma4ImageProcessorPil.from_pretrained(path)
        return cls(images, tokenizer, template, source=path)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> list[str]:
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        copied = []
        for name in _FILES:
            path = cached_file(self.source, name, _raise_exceptions_for_missing_entries=False)
            if path is not None:
                copied.append(shutil.copyfile(path, Path(save_directory) / name))
        return copied


def load_gemma3n_processor(path: str) -> Gemma3nProcessor:
    """Return the processor of a Gemma 3n with the PIL image processor."""
    processor = Gemma3nProcessor.from_pretrained(path)
    processor.image_processor = SiglipImageProcessorPil.from_pretrained(path)
    return processor
