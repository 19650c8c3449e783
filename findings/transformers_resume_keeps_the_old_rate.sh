#!/usr/bin/env bash
# transformers 5.23.0: a run resumed with more steps trains its first step at the old schedule's rate, and one resumed with
# another learning rate ignores it, without a word.
#
# Assumed: `Trainer(args).train(resume_from_checkpoint=True)` takes `max_steps` and `learning_rate` of `args`: 8 steps of
# a linear schedule from 1.0 have the rates 1.0, 0.875, ..., 0.125, also after a stop at step 4 of 4.
# What happens: the optimizer's state contains the rate, and the scheduler's the peak. With more steps the first one after
# the checkpoint has the rate of the old schedule's end, here 0, so that its batch teaches nothing; then the new schedule
# goes on. Another `learning_rate` changes no step at all.
#
# Output seen:
#   8 steps at once: [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
#   4 of 4 steps, resumed to 8: [0.0, 0.375, 0.25, 0.125]
#   4 of 8 steps, resumed with a rate of 0.1: [0.5, 0.375, 0.25, 0.125]
# Way round: set `max_steps` to the whole run's from the start and stop early; refuse another learning rate on resume, as
# this project does.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0 accelerate==1.15.0
cat >"$tmp/resume.py" <<'P'
import logging
import shutil
import sys
from pathlib import Path

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

transformers.utils.logging.set_verbosity_error()
logging.disable(logging.WARNING)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x, labels):
        return {"loss": ((self.layer(x) - labels) ** 2).mean()}


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.seen.append(round(optimizer.param_groups[0]["lr"], 4))


def train(folder, steps, rate, resume=False):
    options = TrainingArguments(
        output_dir=folder, max_steps=steps, learning_rate=rate, lr_scheduler_type="linear", save_steps=4,
        report_to="none", per_device_train_batch_size=1, use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )
    data = [{"x": torch.ones(1) * i, "labels": torch.ones(1)} for i in range(16)]
    rates = Rates()
    Trainer(Net(), options, train_dataset=data, callbacks=[rates]).train(resume_from_checkpoint=resume)
    return rates.seen


root = Path(sys.argv[1])
whole = train(root / "whole", 8, 1.0)
train(root / "more", 4, 1.0)
more = train(root / "more", 8, 1.0, resume=True)
train(root / "other", 8, 1.0)
shutil.rmtree(root / "other" / "checkpoint-8")
other = train(root / "other", 8, 0.1, resume=True)
print("8 steps at once:", whole)
print("4 of 4 steps, resumed to 8:", more)
print("4 of 8 steps, resumed with a rate of 0.1:", other)
expected = whole[4:]
if more == expected or more[0] != 0 or more[1:] != expected[1:] or other != expected:
    sys.exit("it is otherwise now")
P
"$tmp/venv/bin/python" "$tmp/resume.py" "$tmp" 2>"$tmp/errors" || { tail -5 "$tmp/errors"; exit 1; }
