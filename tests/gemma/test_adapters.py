"""Adapters of every known spelling attach whole; what is incomplete, or no LoRA of this model, is one line."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.adapters.attachment import attach_adapter, check_tensors
from pokegemma.gemma.adapters.base import open_base
from pokegemma.gemma.adapters.reading import read_adapter
from pokegemma.gemma.families import FAMILIES
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.weight_files import plain_name
from pokegemma.training.lora_targets import lora_config
from pokegemma.training.options import ModelOptions

TEXT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OWN_REGEX = r".*language_model\..*\.(" + "|".join(TEXT) + ")"
UNSLOTH_REGEX = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj).*?)|"
    rf"(?:\bmodel\.layers\.[\d]{{1,}}\.(?:self_attn|mlp)\.(?:{'|'.join(TEXT)}))"
)
Q_PROJ = "model.language_model.layers.0.self_attn.q_proj"


def own(name: str) -> str:
    """Return a published name as transformers 5 has it in the model."""
    name = name.replace("language_model.model.", "language_model.").replace("vision_model.", "")
    return f"model.{name}"


def text_only(name: str) -> str:
    return name.replace("language_model.model.", "model.")


def lora_tensors(base: Path, *, vision: bool = False, rename=own) -> dict[str, torch.Tensor]:
    """Return random LoRA tensors for the linear layers of the language model, and of the tower."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, weight in sorted(load_file(base / "model.safetensors").items()):
        is_linear = ".layers." in key and weight.ndim == 2
        if is_linear and ("language_model" in key or vision):
            name = f"base_model.model.{rename(key.removesuffix('.weight'))}"
            tensors[f"{name}.lora_A.weight"] = 0.05 * torch.randn(4, weight.shape[1], generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.05 * torch.randn(weight.shape[0], 4, generator=generator)
    return tensors


def write_adapter(folder: Path, base: Path | None, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base and str(base),
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        "target_modules": OWN_REGEX,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged_weights(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    adapter = read_adapter(folder)
    return attach_adapter(open_checkpoint(base).load_model(), adapter, str(base)).merge_and_unload().state_dict()


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> dict[bool, dict[str, torch.Tensor]]:
    """Return the weights with the adapter of `lora_tensors` added by hand: without and with that of the tower."""
    weights = {}
    for vision in (False, True):
        weights[vision] = open_checkpoint(tiny_model).load_model().state_dict()
        tensors = lora_tensors(tiny_model, vision=vision)
        for name in {name.rpartition(".lora_")[0] for name in tensors}:
            key = f"{name.removeprefix('base_model.model.')}.weight"
            weights[vision][key] += 8 / 4 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    return weights


@pytest.mark.parametrize(
    ("rename", "vision", "targets"),
    [
        pytest.param(own, True, [*TEXT, "out_proj", "fc1", "fc2"], id="transformers 5"),
        pytest.param(own, True, UNSLOTH_REGEX, id="Unsloth"),
        pytest.param(
            lambda name: f"model.{name.replace('language_model.model.', 'language_model.')}",
            True,
            UNSLOTH_REGEX,
            id="Unsloth, transformers 4.52",
        ),
        pytest.param(lambda name: name, True, UNSLOTH_REGEX, id="Unsloth, transformers 4.51"),
        pytest.param(
            lambda name: name,
            False,
            r"^(?!.*(?:vision_tower|multi_modal_projector)).*(?:" + "|".join(TEXT) + ").*",
            id="LLaMA-Factory, transformers 4.51",
        ),
        pytest.param(text_only, False, UNSLOTH_REGEX, id="Unsloth, text-only model"),
        pytest.param(text_only, False, list(TEXT), id="PEFT, text-only model"),
    ],
)
def test_every_known_spelling_adapts_the_same_layers(
    rename, vision: bool, targets, expected, tiny_model: Path, tmp_path: Path
) -> None:
    tensors = lora_tensors(tiny_model, vision=vision, rename=rename)
    folder = write_adapter(tmp_path / "adapter", tiny_model, tensors, target_modules=targets)
    merged = merged_weights(folder, tiny_model)
    assert len(tensors) == 2 * (66 if vision else 42)
    assert merged.keys() == expected[vision].keys()
    assert all(torch.allclose(merged[key], weight, atol=1e-6) for key, weight in expected[vision].items())


def test_names_with_the_adapters_name_are_read_too(expected, tiny_model: Path, tmp_path: Path) -> None:
    """As the state_dict of a PeftModel has them, of which older scripts saved a part."""
    tensors = lora_tensors(tiny_model)
    tensors = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    merged = merged_weights(write_adapter(tmp_path / "adapter", tiny_model, tensors), tiny_model)
    assert torch.allclose(merged[f"{Q_PROJ}.weight"], expected[False][f"{Q_PROJ}.weight"], atol=1e-6)


def test_ranks_and_alphas_of_single_layers_follow_their_names(tiny_model: Path, tmp_path: Path) -> None:
    tensors = lora_tensors(tiny_model, rename=lambda name: name)
    name = "language_model.model.layers.0.self_attn.q_proj"
    tensors[f"base_model.model.{name}.lora_A.weight"] = down = torch.randn(2, 128)
    tensors[f"base_model.model.{name}.lora_B.weight"] = up = torch.randn(128, 2)
    patterns = {"rank_pattern": {name: 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 6}}
    merged = merged_weights(write_adapter(tmp_path / "a", tiny_model, tensors, **patterns), tiny_model)
    weight = open_checkpoint(tiny_model).load_model().state_dict()[f"{Q_PROJ}.weight"]
    assert torch.allclose(merged[f"{Q_PROJ}.weight"], weight + 6 / 2 * up @ down, atol=1e-5)
    folder = write_adapter(tmp_path / "b", tiny_model, tensors)
    with pytest.raises(PokegemmaError, match=f"says rank 4, {name} has rank 2"):
        read_adapter(folder)


@pytest.mark.parametrize("targets", ["q_proj", "embed_tokens", "patch_embedding"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_our_formula_is_that_of_peft(targets: str, options: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """Also for embeddings and convolutions, with the factor of rsLoRA and the lengths of DoRA."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=rf".*\.{targets}", init_lora_weights=False, **options)
    bare = open_checkpoint(tiny_model).load_model().state_dict()
    model = get_peft_model(open_checkpoint(tiny_model).load_model(), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight *= 1.5 if "magnitude" in name else 1
    model.save_pretrained(tmp_path)
    loaded = (
        PeftModel.from_pretrained(open_checkpoint(tiny_model).load_model(), tmp_path).merge_and_unload().state_dict()
    )
    layers = read_adapter(tmp_path).layers
    for key in bare:
        if key.endswith(f".{targets}.weight"):
            layer = layers[plain_name(key.removesuffix(".weight"))]
            assert not torch.allclose(loaded[key], bare[key], atol=1e-3)
            assert torch.allclose(layer.merge_into(bare[key]), loaded[key], atol=1e-5)


def test_a_tensor_that_fits_no_layer_is_counted_and_named(tiny_model: Path, tmp_path: Path) -> None:
    tensors = lora_tensors(tiny_model)
    for part in ("A", "B"):
        tensors[f"base_model.model.model.audio_tower.proj.lora_{part}.weight"] = torch.ones(4, 4)
    adapter = read_adapter(write_adapter(tmp_path / "adapter", tiny_model, tensors))
    with pytest.raises(PokegemmaError, match=r"1 of its 43 layers .* not in .*: model\.audio_tower\.proj"):
        attach_adapter(open_checkpoint(tiny_model).load_model(), adapter, str(tiny_model))


@pytest.mark.parametrize(
    ("rename", "targets", "number"),
    [
        (own, OWN_REGEX, "7 of the 42"),
        (lambda name: name, [*TEXT, "fc1"], "23 of the 58"),  # in the tower fc1, and q, k and v, of four layers
        (text_only, list(TEXT), "7 of the 42"),
    ],
)
def test_layers_without_tensors_are_counted_and_named(
    rename, targets, number: str, tiny_model: Path, tmp_path: Path
) -> None:
    tensors = dict(list(lora_tensors(tiny_model, rename=rename).items())[14:])
    adapter = read_adapter(write_adapter(tmp_path / "adapter", tiny_model, tensors, target_modules=targets))
    with pytest.raises(PokegemmaError, match=rf"{number} layers .* model\.\w+\.\w+") as refused:
        attach_adapter(open_checkpoint(tiny_model).load_model(), adapter, str(tiny_model))
    assert (Q_PROJ in str(refused.value)) is (number == "7 of the 42")


def test_a_layer_with_one_of_two_tensors_is_named(tiny_model: Path, tmp_path: Path) -> None:
    tensors = lora_tensors(tiny_model)
    del tensors[f"base_model.model.{Q_PROJ}.lora_B.weight"]
    with pytest.raises(PokegemmaError, match=rf"1 of 42 layers .*{Q_PROJ}"):
        read_adapter(write_adapter(tmp_path / "adapter", tiny_model, tensors))


def test_a_part_of_a_module_trained_in_full_is_missed(tiny_model: Path, tmp_path: Path) -> None:
    projection = torch.zeros(128, 128)
    tensors = lora_tensors(tiny_model)
    tensors["base_model.model.model.multi_modal_projector.mm_input_projection_weight"] = projection
    adapter = read_adapter(
        write_adapter(tmp_path / "adapter", tiny_model, tensors, modules_to_save=["multi_modal_projector"])
    )
    with pytest.raises(PokegemmaError, match=r"1 of 86 tensors .*multi_modal_projector\.mm_soft_emb_norm\.weight"):
        attach_adapter(open_checkpoint(tiny_model).load_model(), adapter, str(tiny_model))


def test_a_copy_of_the_embeddings_must_be_those_of_the_base(tiny_model: Path, tmp_path: Path) -> None:
    """PEFT adds one where it takes the embeddings for resized."""
    name = "base_model.model.model.language_model.embed_tokens.weight"
    embeddings = load_file(tiny_model / "model.safetensors")["language_model.model.embed_tokens.weight"]
    model = open_checkpoint(tiny_model).load_model()
    tensors = lora_tensors(tiny_model)
    for copy, message in ((embeddings + 1, f"{name} is not LoRA"), (torch.cat([embeddings] * 2), "tokens were added")):
        folder = write_adapter(tmp_path / message[:6], tiny_model, {**tensors, name: copy})
        with pytest.raises(PokegemmaError, match=message):
            attach_adapter(model, read_adapter(folder), str(tiny_model))
    for dtype in (torch.bfloat16, torch.float16):
        folder = write_adapter(tmp_path / str(dtype), tiny_model, {**tensors, name: embeddings.to(dtype)})
        attach_adapter(model, read_adapter(folder), str(tiny_model))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "type PROMPT_TUNING"),
        ({"peft_type": "LOHA"}, "type LOHA"),
        ({"peft_type": "NONE"}, "type NONE"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"bias": "lora_only"}, "bias='lora_only', which is not supported"),
        ({"rank_pattern": None}, "rank_pattern is None"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    config: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "adapter", tiny_model, lora_tensors(tiny_model), **config)
    with pytest.raises(PokegemmaError, match=message):
        read_adapter(folder)


def test_tensors_without_rows_are_named(tiny_model: Path, tmp_path: Path) -> None:
    tensors = lora_tensors(tiny_model)
    tensors[f"base_model.model.{Q_PROJ}.lora_A.weight"] = torch.tensor(1.0)
    with pytest.raises(PokegemmaError, match=rf"1 of 42 layers .*{Q_PROJ}"):
        read_adapter(write_adapter(tmp_path / "adapter", tiny_model, tensors))


def test_an_lm_head_spelled_with_a_prefix_does_not_stand_for_the_tower(tiny_model: Path, tmp_path: Path) -> None:
    """transformers 4.51 had it below language_model, where a regex for the language model finds it."""
    tensors = lora_tensors(tiny_model, rename=lambda name: name)
    head = "base_model.model.language_model.lm_head.lora_"
    tensors |= {f"{head}A.weight": torch.ones(4, 128), f"{head}B.weight": torch.ones(1088, 4)}
    regex = r".*language_model.*\.(" + "|".join((*TEXT, "lm_head")) + ")"
    adapter = read_adapter(write_adapter(tmp_path / "adapter", tiny_model, tensors, target_modules=regex))
    attach_adapter(open_checkpoint(tiny_model).load_model(), adapter, str(tiny_model))
    assert len(adapter.layers) == 43


def test_weights_that_are_not_finite_are_counted_and_named(tiny_model: Path, tmp_path: Path) -> None:
    tensors = lora_tensors(tiny_model)
    tensors[f"base_model.model.{Q_PROJ}.lora_B.weight"][3, 1] = float("nan")
    with pytest.raises(PokegemmaError, match=rf"1 of 84 tensors .* \(base_model\.model\.{Q_PROJ}\.lora_B\.weight\)"):
        read_adapter(write_adapter(tmp_path / "adapter", tiny_model, tensors))


def test_an_adapter_in_the_old_format_says_how_to_convert_it(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", tiny_model, lora_tensors(tiny_model))
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(PokegemmaError, match=r"adapter_model\.bin: .* python -c 'import torch") as refused:
        read_adapter(folder)
    command = str(refused.value).partition("python -c '")[2].removesuffix("'")
    exec(command.replace('"adapter_', f'"{folder}/adapter_'), {})
    assert len(read_adapter(folder).layers) == 42


def test_a_base_that_is_not_named_or_not_here_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    adapter = read_adapter(write_adapter(tmp_path / "adapter", None, lora_tensors(tiny_model)))
    with pytest.raises(PokegemmaError, match=r"names no base; .* --base_model BASE"):
        open_base(adapter)
    for named in ("/home/someone/gemma", "someone/gemma"):
        config = dataclasses.replace(adapter.config, base_model_name_or_path=named)
        with pytest.raises(PokegemmaError, match=rf"its base cannot be used: {named}: .* --base_model BASE"):
            open_base(dataclasses.replace(adapter, config=config))
        assert open_base(dataclasses.replace(adapter, config=config), str(tiny_model)).path == str(tiny_model)


def test_a_checkpoint_that_lacks_a_tensor_is_not_continued(tiny_model: Path, tmp_path: Path) -> None:
    options = ModelOptions(finetuning="lora", train_vision_tower=True, train_projector=True, use_dora=True)
    model = get_peft_model(open_checkpoint(tiny_model).load_model(), lora_config(options, FAMILIES["gemma3"]))
    model.save_pretrained(tmp_path)
    check_tensors(tmp_path, model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gone = f"base_model.model.{Q_PROJ}.lora_A.weight"
    del tensors[gone]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PokegemmaError, match=f"1 tensors .*: {gone};"):
        check_tensors(tmp_path, model)
