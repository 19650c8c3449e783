#!/usr/bin/env bash
# mlx-vlm 0.7.10, mlx 0.32.4.
#
# A Gemma 3 whose LM head was trained apart from its embeddings (tie_word_embeddings: false, both tensors in the file).
# One would assume: the head that is stored computes the logits, or loading fails.
# What happens: load_model replaces the head with the embeddings, without a warning. LanguageModel.sanitize looks for
# "lm_head.weight", and the tensor is called "language_model.lm_head.weight". Under the name that it looks for, the
# strict loading of weights refuses the file. So no Gemma 3 with a head of its own can be run or converted.
#
# Output seen:
#   stored head equals stored embeddings: False
#   loaded head equals stored head: False
#   loaded head equals stored embeddings: True
#   as lm_head.weight: ValueError: Received 1 parameters not in model: lm_head.weight.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==0.32.4" "mlx-vlm==0.7.10"
"$tmp/venv/bin/python" - "$tmp" <<'PYTHON'
import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_vlm.models.gemma3 import Model, ModelConfig, TextConfig, VisionConfig
from mlx_vlm.utils import load_model

HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
config = {
    "model_type": "gemma3", "vocab_size": 64, "hidden_size": 32, "pad_token_id": 0, "image_token_index": 60,
    "mm_tokens_per_image": 4, "eos_token_id": [1], "tie_word_embeddings": False,
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "mm_tokens_per_image": 4,
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64,
        "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
    },
}
mx.random.seed(0)
parts = {
    "text_config": TextConfig.from_dict(config["text_config"]),
    "vision_config": VisionConfig.from_dict(config["vision_config"]),
}
stored = dict(tree_flatten(Model(ModelConfig.from_dict({**config, **parts})).parameters()))
stored[EMBEDDINGS], stored[HEAD] = mx.random.normal((64, 32)), mx.random.normal((64, 32))


def load(name):
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    renamed = {name if key == HEAD else key: value for key, value in stored.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), renamed, metadata={"format": "mlx"})
    return load_model(folder).language_model


loaded = load(HEAD).lm_head.weight
same = {
    "stored head equals stored embeddings": mx.array_equal(stored[HEAD], stored[EMBEDDINGS]).item(),
    "loaded head equals stored head": mx.array_equal(loaded, stored[HEAD]).item(),
    "loaded head equals stored embeddings": mx.array_equal(loaded, stored[EMBEDDINGS]).item(),
}
for what, is_so in same.items():
    print(f"{what}: {is_so}")
try:
    load("lm_head.weight")
    refused = False
except ValueError as error:
    refused = "lm_head.weight" in str(error)
    print(f"as lm_head.weight: ValueError: {' '.join(str(error).split())}")
if list(same.values()) != [False, False, True] or not refused:
    sys.exit("mlx-vlm behaves differently now")
PYTHON
