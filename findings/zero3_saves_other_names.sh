#!/usr/bin/env bash
# Under DeepSpeed ZeRO-3, save_pretrained of transformers 5.23.0 writes other names than it read.
#
# One would assume: a checkpoint that is loaded and saved keeps the names of its tensors, as it does without ZeRO-3.
# What happens: loading under ZeRO-3 keeps every renaming that transformers knows for the architecture; otherwise it keeps
# those that the checkpoint needed. Saving undoes all that were kept, so a prefix is added twice. transformers reads
# the result back, llama.cpp's converter refuses it ("Can not map tensor").
# Seen with torch 2.13.0, deepspeed 0.19.8, one process on a CPU:
#     plain language_model.model.embed_tokens.weight
#     zero3 language_model.model.model.embed_tokens.weight
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 deepspeed==0.19.8

cat >"$folder/save.py" <<'PYTHON'
import deepspeed
import torch
from safetensors import safe_open
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.integrations import HfDeepSpeedConfig

deepspeed.ops.__compatible_ops__ = {}  # compile nothing
text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
vision = dict(**text, image_size=28, patch_size=14, vision_use_head=False)
text |= dict(vocab_size=64, num_key_value_heads=1, head_dim=16)


def embeddings(folder):
    with safe_open(f"{folder}/model.safetensors", "pt") as weights:
        return next(name for name in weights.keys() if "embed_tokens" in name)


config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
Gemma3ForConditionalGeneration(config).save_pretrained("base")
Gemma3ForConditionalGeneration.from_pretrained("base").save_pretrained("plain")
print("plain", embeddings("plain"))

deepspeed.init_distributed(dist_backend="gloo")
zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
model = Gemma3ForConditionalGeneration.from_pretrained("base")
weights = dict(model.named_parameters())
with deepspeed.zero.GatheredParameters(list(weights.values())):
    model.save_pretrained("zero3", state_dict={name: weight.detach().clone() for name, weight in weights.items()})
print("zero3", embeddings("zero3"))
PYTHON
export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29533 DS_ACCELERATOR=cpu
seen=$(cd "$folder" && venv/bin/python save.py 2>/dev/null | grep -E '^(plain|zero3) ')
echo "$seen"
[[ $seen == "plain language_model.model.embed_tokens.weight
zero3 language_model.model.model.embed_tokens.weight" ]]
