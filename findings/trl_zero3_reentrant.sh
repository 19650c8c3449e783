#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0, peft 0.21.2, accelerate 1.15.0, deepspeed 0.19.8, torch 2.13.0 (CPU).
#
# TRL forces reentrant gradient checkpointing for adapters under DeepSpeed ZeRO-3: it sets
# args.gradient_checkpointing_kwargs["use_reentrant"] = True, with a warning where the user said False.
# One would assume: checkpointing is then reentrant, whatever the user passed.
# What happens: transformers reads args.activation_checkpointing_kwargs. A dict of the user's is the same object under
# both names, so it is changed; where the user passed none, TRL's new dict has only the old name, and is not read.
# So checkpointing is reentrant exactly where somebody asked for it, or asked against it. Both train here.
#
# Output seen:
#   user passed None: TRL set {'use_reentrant': True}, layers use reentrant=False
#   user passed {'use_reentrant': False}: TRL set {'use_reentrant': True}, layers use reentrant=True
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 trl==1.16.0 transformers==5.23.0 \
    peft==0.21.2 accelerate==1.15.0 deepspeed==0.19.8
cat > "$tmp/config.yaml" <<'YAML'
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
num_machines: 1
num_processes: 1
mixed_precision: "no"
use_cpu: true
deepspeed_config: {zero_stage: 3, zero3_init_flag: true, offload_optimizer_device: none, offload_param_device: none}
YAML
cat > "$tmp/train.py" <<'PYTHON'
import sys

import deepspeed

deepspeed.ops.__compatible_ops__ = {}  # one process on a CPU needs none of what would be compiled
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

passed = {"None": None, "False": {"use_reentrant": False}}[sys.argv[1]]
shown = str(passed)
words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="a"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
config = SFTConfig(
    output_dir=sys.argv[2], max_steps=1, per_device_train_batch_size=1, report_to="none", save_strategy="no",
    use_cpu=True, bf16=False, gradient_checkpointing=True, gradient_checkpointing_kwargs=passed, logging_strategy="no",
)


class Look(TrainerCallback):
    def on_train_begin(self, args, state, control, model, **kwargs):
        layers = [layer for layer in model.modules() if type(layer).__name__ == "LlamaDecoderLayer"]
        (in_force,) = {layer._gradient_checkpointing_func.keywords["use_reentrant"] for layer in layers}
        print(f"user passed {shown}: TRL set {args.gradient_checkpointing_kwargs}, layers use reentrant={in_force}")


SFTTrainer(
    model=LlamaForCausalLM(LlamaConfig(vocab_size=4, num_key_value_heads=2, **shape)), args=config,
    train_dataset=Dataset.from_list([{"text": "a b a b"}] * 4), processing_class=tokenizer,
    peft_config=LoraConfig(target_modules=["q_proj"]), callbacks=[Look()],
).train()
PYTHON
for passed in None False; do
    HF_HUB_OFFLINE=1 "$tmp/venv/bin/python" -m accelerate.commands.launch --config_file "$tmp/config.yaml" \
        --main_process_port 29577 "$tmp/train.py" "$passed" "$tmp/output" 2> "$tmp/errors" | grep "^user passed" \
        || { tail -n 20 "$tmp/errors" >&2; exit 1; }
done | tee "$tmp/seen"
diff "$tmp/seen" - <<'EXPECTED' || { echo "TRL or transformers behaves differently now" >&2; exit 1; }
user passed None: TRL set {'use_reentrant': True}, layers use reentrant=False
user passed {'use_reentrant': False}: TRL set {'use_reentrant': True}, layers use reentrant=True
EXPECTED
