#!/usr/bin/env bash
# torch 2.13.0, CPU: in bfloat16, F.linear of a slice of the places takes many times as long as that of its copy.
#
# Assumed: hidden[:, -4:] and hidden[:, -4:].contiguous() take about the same time in F.linear; copying 32 rows is nothing.
# What happens: for three-dimensional input that is not contiguous, bfloat16 takes another way. With the 262,144 outputs
# of a Gemma it needs most of a training step. transformers' `logits_to_keep=4` makes such a slice before the LM head.
# In float32 the difference is small. Values are equal within bfloat16's rounding.
#
# Output seen (1 thread, a busy CPU with AVX-512 BF16; 8 rows, 4 of 120 places, width 640, 65,536 outputs):
#   torch.float32: slice 0.195 s, copy 0.060 s, 3.2 times
#   torch.bfloat16: slice 1.958 s, copy 0.012 s, 162.6 times
# Way round: pass `logits_to_keep` a tensor of places, by which transformers takes a copy.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cat >"$tmp/measure.py" <<'P'
import statistics
import sys
import time

import torch

if "avx512_bf16" not in open("/proc/cpuinfo").read():
    sys.exit("this CPU has no AVX-512 BF16, where it was seen")
torch.set_num_threads(1)
torch.manual_seed(0)


def seconds(states, weight):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        torch.nn.functional.linear(states, weight)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


ratios = {}
for dtype in (torch.float32, torch.bfloat16):
    hidden = torch.randn(8, 120, 640).to(dtype)
    head = torch.randn(65536, 640).to(dtype)
    part = hidden[:, -4:]
    of_slice, of_copy = seconds(part, head), seconds(part.contiguous(), head)
    ratios[dtype] = of_slice / of_copy
    print(f"{dtype}: slice {of_slice:.3f} s, copy {of_copy:.3f} s, {ratios[dtype]:.1f} times")
sys.exit(0 if ratios[torch.bfloat16] > 10 > ratios[torch.float32] else "torch behaves differently now")
P
"$tmp/venv/bin/python" "$tmp/measure.py"
