#!/usr/bin/env bash
# accelerate 1.15.0 replaces FSDP by DistributedDataParallel on CPU processes, without a message.
#
# One would assume: an Accelerator that is given an FSDP plugin shards the model, or refuses. PyTorch's FSDP2 itself
# works on CPUs (gloo).
# What happens: with cpu=True (or use_cpu: true in the config file) the plugin is dropped. Nothing is logged. A test that
# compares the losses with those of one process passes, and has tested DDP.
# Seen with torch 2.13.0:
#     MULTI_CPU DistributedDataParallel Parameter fsdp_plugin=None
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0

cat >"$folder/prepare.py" <<'PYTHON'
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin

plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
model = accelerator.prepare(torch.nn.Linear(4, 4))
if accelerator.is_main_process:
    parameter, kept = type(next(model.parameters())).__name__, getattr(accelerator.state, "fsdp_plugin", None)
    print(accelerator.distributed_type.value, type(model).__name__, parameter, f"fsdp_plugin={kept}")
accelerator.end_training()
PYTHON
seen=$("$folder/venv/bin/torchrun" --nproc_per_node 2 "$folder/prepare.py" 2>/dev/null)
echo "$seen"
[[ $seen == "MULTI_CPU DistributedDataParallel Parameter fsdp_plugin=None" ]]
