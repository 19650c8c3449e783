#!/usr/bin/env bash
# With transformers 5.23.0's Trainer, a step of Gemma 4 depends on how its samples are cut into passes; Gemma 3's does not.
#
# One would assume: two passes of one sample with gradient accumulation give the gradient of one pass of both samples.
# Since 4.46 the Trainer divides the loss by the labelled tokens of the whole step.
# What happens: Gemma4ForConditionalGeneration says accepts_loss_kwargs = False, so each pass is averaged over its own
# tokens and all passes count the same. Tokens of a short answer weigh more than those of a long one.
# Seen with torch 2.13.0 (samples with 1 and 15 labelled tokens; difference relative to the largest change):
#     Gemma3ForConditionalGeneration: accumulated and whole step differ by less than 0.001
#     Gemma4ForConditionalGeneration: accumulated and whole step differ by more than 0.1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0

cat >"$folder/accumulate.py" <<'PYTHON'
import copy

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

text = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
text |= dict(num_key_value_heads=1, head_dim=16, layer_types=["sliding_attention", "full_attention"])
vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
gemma3 = Gemma3Config(text_config=text, vision_config=vision | dict(image_size=28, patch_size=14), mm_tokens_per_image=4)
text |= dict(vocab_size_per_layer_input=64, hidden_size_per_layer_input=16, global_head_dim=16)
gemma4 = Gemma4Config(
    text_config=text, vision_config=vision | dict(num_key_value_heads=2, head_dim=16), audio_config=None
)
ids = torch.arange(4, 20)
samples = [
    {"input_ids": ids, "labels": torch.where(ids > 18, ids, -100)},
    {"input_ids": ids.flip(0), "labels": torch.where(ids.flip(0) < 19, ids.flip(0), -100)},
]


def collate(rows):
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    zeros = torch.zeros_like(batch["input_ids"])
    return {**batch, "attention_mask": zeros + 1, "token_type_ids": zeros, "mm_token_type_ids": zeros}


def step(model, batch_size):
    model = copy.deepcopy(model)
    before = [weight.detach().clone() for weight in model.parameters()]
    args = TrainingArguments(
        output_dir="out", max_steps=1, per_device_train_batch_size=batch_size, report_to="none", save_strategy="no",
        gradient_accumulation_steps=2 // batch_size, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
        max_grad_norm=0.0, use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
    )
    Trainer(model, args, train_dataset=samples, data_collator=collate).train()
    return torch.cat([(after.detach() - old).flatten() for after, old in zip(model.parameters(), before)])


for kind, config in ((Gemma3ForConditionalGeneration, gemma3), (Gemma4ForConditionalGeneration, gemma4)):
    set_seed(0)
    model = kind(config)
    accumulated, whole = step(model, 1), step(model, 2)
    difference = ((accumulated - whole).abs().max() / whole.abs().max()).item()
    print(f"difference {difference:.6f}")
    size = "less than 0.001" if difference < 0.001 else "more than 0.1" if difference > 0.1 else f"{difference:.3f}"
    print(f"{kind.__name__}: accumulated and whole step differ by {size}")
PYTHON
seen=$(cd "$folder" && HF_HUB_OFFLINE=1 venv/bin/python accumulate.py 2>"$folder/errors" | grep ^Gemma) || { tail -n 20 "$folder/errors" >&2; exit 1; }
echo "$seen"
[[ $seen == "Gemma3ForConditionalGeneration: accumulated and whole step differ by less than 0.001
Gemma4ForConditionalGeneration: accumulated and whole step differ by more than 0.1" ]]
