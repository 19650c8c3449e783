#!/usr/bin/env bash
# peft 0.21.2: modules_to_save compares the ends of names, target_modules whole names.
#
# One would assume that both lists select alike: modules_to_save=["norm"] trains model.norm, as
# target_modules=["q_proj"] adapts modules that are called q_proj and no module that only ends so.
#
# What happens: modules_to_save=["norm"] also trains every input_layernorm, post_attention_layernorm, q_norm and
# k_norm in full, and saves them: in a Gemma 3 of two layers 13 modules, not one. target_modules=["proj"] matches none.
# Whoever reads an adapter and wants to know which modules are trained in full must compare ends, too.
#
# Output seen:
#   modules_to_save=['norm'] trains 13 modules: input_layernorm k_norm norm post_attention_layernorm
#   post_feedforward_layernorm pre_feedforward_layernorm q_norm
#   target_modules=['proj'] matches nothing: Target modules {'proj'} not found in the base model
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$tmp/venv/bin/python" - <<'PYTHON'
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig


def model():
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, layer_types=["full_attention"] * 2,
        )
    )


adapted = get_peft_model(model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
trained = {name.split(".modules_to_save")[0] for name, _ in adapted.named_parameters() if ".modules_to_save." in name}
print(f"modules_to_save=['norm'] trains {len(trained)} modules:", *sorted({name.split(".")[-1] for name in trained}))
try:
    get_peft_model(model(), LoraConfig(target_modules=["proj"]))
    matched = True
except ValueError as error:
    matched = False
    print("target_modules=['proj'] matches nothing:", str(error).split(".")[0])
raise SystemExit(0 if len(trained) == 13 and not matched else 1)
PYTHON
