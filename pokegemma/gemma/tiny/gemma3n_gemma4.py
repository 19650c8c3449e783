"""Tiny random Gemma 3n and 4 checkpoints that load wherever the published ones do; that of Gemma 3 is in gemma3."""

import json
from pathlib import Path

from transformers import (
    AutoModelForImageTextToText,
    Gemma3nAudioFeatureExtractor,
    Gemma3nConfig,
    Gemma3nProcessor,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ImageProcessorPil,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    SiglipImageProcessorPil,
    set_seed,
)

from pokegemma.gemma.families import FAMILIES, require_packages
from pokegemma.gemma.tiny.tokenizer import CHAT_TEMPLATE, train_tokenizer

_GEMMA3N_CONTROL_SYMBOLS = ["<mask>", "[multimodal]", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"]
_GEMMA3N_CONTROL_SYMBOLS += ["<start_of_audio>"]
_GEMMA3N_TOKENS = {
    "boi_token": "<start_of_image>",
    "boa_token": "<start_of_audio>",
    # In this order after the text's vocabulary: two of the pictures' own vocabulary, two of the audio's.
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
    "eoa_token": "<end_of_audio>",
    "audio_token": "<audio_soft_token>",
}
_GEMMA3N_TEMPLATE = CHAT_TEMPLATE.replace("<start_of_image>", "<image_soft_token>")

_GEMMA4_TOKENS = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
}
_GEMMA4_CONTROL_SYMBOLS = ["<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|video|>"]
_GEMMA4_CONTROL_SYMBOLS += [*_GEMMA4_TOKENS.values()]
_GEMMA4_TEMPLATE = (
    CHAT_TEMPLATE.replace("<start_of_image>", "<|image|>")
    .replace("<start_of_turn>", "<|turn>")
    .replace("<end_of_turn>", "<turn|>")
)

_SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 8192,
    **_SPECIAL,
}
_GEMMA3N_TEXT = {
    **_TEXT,
    "hidden_size_per_layer_input": 64,
    "num_kv_shared_layers": 2,
    "laurel_rank": 64,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
}
_GEMMA3N_AUDIO = {
    "hidden_size": 32,
    "conf_num_hidden_layers": 1,
    "conf_num_attention_heads": 2,
    "vocab_size": 2,
    "sscp_conv_channel_size": (8, 4),
}
_GEMMA4_TEXT = {**_TEXT, "global_head_dim": 64, "final_logit_softcapping": 30.0}
_GEMMA4_SMALL_TEXT = {**_GEMMA4_TEXT, "hidden_size_per_layer_input": 64, "num_kv_shared_layers": 2}
_GEMMA4_LARGE_TEXT = {
    **_GEMMA4_TEXT,
    "hidden_size_per_layer_input": 0,
    "use_bidirectional_attention": "vision",
    "attention_k_eq_v": True,
}
_GEMMA4_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "position_embedding_size": 1024,
}
_GEMMA4_AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "output_proj_dims": 32,
    "subsampling_conv_channels": [8, 4],
}


def _write_model(folder: Path, config: PreTrainedConfig, *, end_of_turn: int) -> None:
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(
        **{**_SPECIAL, "eos_token_id": [1, end_of_turn]}, cache_implementation="hybrid", do_sample=False
    )
    model.save_pretrained(folder)


def write_gemma3n_processor(
    folder: Path, *, seed: int = 0, image_size_px: int = 256, num_image_tokens: int = 256
) -> PreTrainedTokenizerBase:
    """Write tokenizer, chat template and processor of a tiny Gemma 3n, for which timm is not needed."""
    tokenizer = train_tokenizer(folder, seed=seed, control_symbols=_GEMMA3N_CONTROL_SYMBOLS, tokens=_GEMMA3N_TOKENS)
    size = {"height": image_size_px, "width": image_size_px}
    Gemma3nProcessor(
        feature_extractor=Gemma3nAudioFeatureExtractor(),
        image_processor=SiglipImageProcessorPil(size=size, do_normalize=False, resample=2),
        tokenizer=tokenizer,
        chat_template=_GEMMA3N_TEMPLATE,
        image_seq_length=num_image_tokens,
    ).save_pretrained(folder)
    return tokenizer


def make_tiny_gemma3n(
    folder: Path, *, seed: int = 0, image_size_px: int = 256, num_image_tokens: int = 256, sliding_window: int = 512
) -> None:
    """Write a tiny random Gemma 3n of about 8 million weights, most of which make the tower's 2048 channels.

    It has the published MobileNet V5 with a sixteenth of its channels, per-layer embeddings, AltUp, LAuReL, sparse
    activations, layers that share keys and values, and an audio tower.

    Args:
        folder: an existing folder.
        num_image_tokens: tokens a picture, the square of a number.

    Raises:
        PokegemmaError: timm is missing.
    """
    require_packages(FAMILIES["gemma3n"], where=str(folder))
    set_seed(seed)
    tokenizer = write_gemma3n_processor(
        folder, seed=seed, image_size_px=image_size_px, num_image_tokens=num_image_tokens
    )
    offset = tokenizer.convert_tokens_to_ids("<end_of_image>")
    assert tokenizer.audio_token_id == offset + 3 == len(tokenizer) - 1
    config = Gemma3nConfig(
        text_config={
            **_GEMMA3N_TEXT,
            "vocab_size": len(tokenizer),
            "vocab_size_per_layer_input": offset,
            "sliding_window": sliding_window,
        },
        vision_config={
            "architecture": "mobilenetv5_300m_enc",
            "hidden_size": 2048,
            "vocab_size": 2,
            "vocab_offset": offset,
            "model_args": {"channel_multiplier": 0.0625, "msfa_output_resolution": int(num_image_tokens**0.5)},
        },
        audio_config={**_GEMMA3N_AUDIO, "vocab_offset": offset + 2},
        vision_soft_tokens_per_image=num_image_tokens,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=offset,
        image_token_id=tokenizer.image_token_id,
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_id=offset + 2,
        audio_token_id=tokenizer.audio_token_id,
    )
    _write_model(folder, config, end_of_turn=tokenizer.convert_tokens_to_ids("<end_of_turn>"))


def make_tiny_gemma4(
    folder: Path, *, seed: int = 0, max_image_tokens: int = 280, sliding_window: int = 512, large: bool = False
) -> None:
    """Write a tiny random Gemma 4 of about 1 million weights.

    Args:
        folder: an existing folder.
        max_image_tokens: most tokens a picture: 70, 140, 280, 560 or 1120; its shape decides how many it has.
        large: built as 31B, whose attention in sliding layers is bidirectional inside pictures and whose full layers
            use keys as values; otherwise as E2B and E4B, with per-layer embeddings, layers that share keys and values,
            and an audio tower.
    """
    set_seed(seed)
    tokenizer = train_tokenizer(folder, seed=seed, control_symbols=_GEMMA4_CONTROL_SYMBOLS, tokens=_GEMMA4_TOKENS)
    (folder / "tokenizer.model").unlink()  # the published ones have none
    _write_gemma4_processor(folder, max_image_tokens=max_image_tokens)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _GEMMA4_TOKENS.items()}
    vocabulary = 64 * -(-len(tokenizer) // 64)
    config = Gemma4Config(
        text_config={
            **(_GEMMA4_LARGE_TEXT if large else _GEMMA4_SMALL_TEXT),
            "vocab_size": vocabulary,
            "vocab_size_per_layer_input": vocabulary,
            "sliding_window": sliding_window,
        },
        vision_config=_GEMMA4_VISION,
        audio_config=None if large else _GEMMA4_AUDIO,
        boi_token_id=ids["boi_token"],
        eoi_token_id=ids["eoi_token"],
        image_token_id=ids["image_token"],
        boa_token_id=ids["boa_token"],
        eoa_token_index=ids["eoa_token"],
        audio_token_id=ids["audio_token"],
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
    )
    _write_model(folder, config, end_of_turn=tokenizer.convert_tokens_to_ids("<turn|>"))


def _write_gemma4_processor(folder: Path, *, max_image_tokens: int) -> None:
    """Write the chat template and the processor's configuration."""
    (folder / "chat_template.jinja").write_text(_GEMMA4_TEMPLATE, encoding="utf-8")
    images = Gemma4ImageProcessorPil(max_soft_tokens=max_image_tokens)
    processor = {
        "processor_class": "Gemma4Processor",
        "image_seq_length": max_image_tokens,
        "image_processor": {**json.loads(images.to_json_string()), "image_processor_type": "Gemma4ImageProcessor"},
        "feature_extractor": json.loads(Gemma4AudioFeatureExtractor().to_json_string()),
        "video_processor": {"video_processor_type": "Gemma4VideoProcessor"},
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")
