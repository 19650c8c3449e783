"""Which layers get an adapter, and its config."""

from collections.abc import Sequence

from peft import LoraConfig

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.families import LINEAR_LAYERS, TOWER, Family
from pokegemma.training.options import ModelOptions, WeightOptions


def lora_target_pattern(family: Family, *, named: Sequence[str], train_vision_tower: bool) -> str:
    """Return a regex of the layers that get an adapter: the `named` linear layers of the trained parts, or all.

    Raises:
        PokegemmaError: the tower is to be trained and has no layers that LoRA supports.
    """
    patterns = [rf".*language_model\..*\.({'|'.join(named or LINEAR_LAYERS)})"]
    if train_vision_tower:
        if not family.tower_linears:
            raise PokegemmaError(
                f"--train_vision_tower: the tower of {family.name} has no linear layers for LoRA; "
                "use --finetuning full, or leave it out"
            )
        patterns.append(rf".*{TOWER}\..*\.({'|'.join(named or family.tower_linears)}){family.tower_suffix}")
    return "|".join(f"({pattern})" for pattern in patterns)


def lora_config(options: ModelOptions, family: Family) -> LoraConfig:
    """Return the adapter's config. Its layers are a regex, because names such as q_proj would also match SigLIP.

    `--lora_target_modules` narrows or widens the linear layers by name, within the parts that are trained.
    """
    named, in_full = named_layers(options), list(options.lora_modules_to_save or [])
    if options.train_projector:  # its weight is a bare parameter, not a linear layer: it is trained in full
        in_full.append(family.projector)
    pattern = lora_target_pattern(family, named=named, train_vision_tower=options.train_vision_tower)
    return adapter_config(options, pattern, in_full=in_full)


def named_layers(options: WeightOptions) -> list[str]:
    """Return the linear layers that `--lora_target_modules` names; none for all."""
    given = options.lora_target_modules or []  # ModelConfig makes a list of one a string
    return [name for name in ([given] if isinstance(given, str) else given) if name != "all-linear"]


def adapter_config(options: WeightOptions, pattern: str, *, in_full: Sequence[str]) -> LoraConfig:
    """Return the config of an adapter of the layers that a regex matches; modules `in_full` are trained whole."""
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        bias="none",
        target_modules=pattern,
        modules_to_save=list(in_full) or None,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        task_type="CAUSAL_LM",
    )
