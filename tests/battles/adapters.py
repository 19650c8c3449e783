"""Adapters of policies with random weights, as training would leave them."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from pokegemma.battles.policy.checkpoint import open_policy

LAYERS = r"model\.layers\..*\.(q_proj|v_proj|up_proj|down_proj)"


def write_random_adapter(folder: Path, base: Path, *, std: float = 0.1) -> None:
    """Write a LoRA adapter of a policy; `std` is that of its B."""
    torch.manual_seed(1)
    model = get_peft_model(open_policy(base).load_model(), LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    model.save_pretrained(folder)
