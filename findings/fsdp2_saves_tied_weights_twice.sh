#!/usr/bin/env bash
# The full state dictionary of an FSDP2 model holds tied weights twice, and transformers 5.23.0 saves both.
#
# One would assume: save_pretrained leaves out lm_head.weight where it is tied to the embeddings, as it does without FSDP.
# What happens: get_model_state_dict gathers a tensor of its own for each name. save_pretrained finds tied weights by
# their memory, so it sees two different ones. For Gemma 3 4B that is 1.3 GB more, and a tensor that converters do not expect.
# Seen with torch 2.13.0, two processes on a CPU; the model itself is still tied:
#     one process: model.embed_tokens.weight
#     FSDP2: lm_head.weight model.embed_tokens.weight
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0

cat >"$folder/save.py" <<'PYTHON'
import torch
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import Gemma3ForCausalLM, Gemma3TextConfig


def embeddings(folder):
    with safe_open(f"{folder}/model.safetensors", "pt") as weights:
        return " ".join(sorted(name for name in weights.keys() if "embed" in name or "head" in name))


torch.distributed.init_process_group("gloo")
is_first = torch.distributed.get_rank() == 0
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=16))
if is_first:
    model.save_pretrained("one")
    print("one process:", embeddings("one"))
fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
assert model.lm_head.weight is model.model.embed_tokens.weight
if is_first:
    model.save_pretrained("fsdp2", state_dict=state)
    print("FSDP2:", embeddings("fsdp2"))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
PYTHON
seen=$(cd "$folder" && venv/bin/torchrun --nproc_per_node 2 save.py 2>/dev/null | grep -E '^(one|FSDP2)')
echo "$seen"
[[ $seen == "one process: model.embed_tokens.weight
FSDP2: lm_head.weight model.embed_tokens.weight" ]]
