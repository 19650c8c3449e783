"""Whether the model can be loaded from a folder, the local cache or the Hugging Face Hub, complete and permitted."""

from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # of the client that this version of the library uses, httpx or httpx2
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from pokegemma.data.checks.records import Check
from pokegemma.environment import GIB
from pokegemma.errors import PokegemmaError, one_line
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.weight_files import weight_files


def _folder_problems(folder: Path) -> list[str]:
    """Return problems of a checkpoint folder: of its config, weights, tokenizer, image processor or chat template."""
    if not (folder / "config.json").is_file():
        return ["config.json is missing"]
    problems, files = [], []
    try:
        files = weight_files(folder)
    except PokegemmaError as error:
        problems.append(str(error).removeprefix(f"{folder}: "))
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass  # compares the header with the file's size
        except (SafetensorError, OSError) as error:
            problems.append(f"{path.name} is damaged: {error}")
    try:
        _ = open_checkpoint(folder).processor
    except PokegemmaError as error:
        problems.append(str(error).removeprefix(f"{folder}: "))
    return problems


def _check_hub_access(model: str) -> Check:
    name, absent = "model access", f"{model} is not on this machine"
    licence = f"accept its licence at https://huggingface.co/{model} and set HUGGINGFACE_TOKEN in .env"
    if constants.is_offline_mode():
        return Check(name, "FAIL", f"{absent}, and HF_HUB_OFFLINE forbids to download it")
    try:
        api = HfApi()
        api.auth_check(model)
        files = api.model_info(model, files_metadata=True).siblings or []
    except GatedRepoError:
        return Check(name, "FAIL", f"{model} is gated: {licence}")
    except RepositoryNotFoundError:
        return Check(name, "FAIL", f"{model}: no such model on the Hugging Face Hub, or it is private: {licence}")
    except OfflineModeIsEnabled:
        return Check(name, "FAIL", f"{absent}, and HF_HUB_OFFLINE forbids to download it")
    except (HfHubHTTPError, HTTPError, OSError) as error:
        reason = one_line(error)
        return Check(name, "FAIL", f"{absent}, and the Hugging Face Hub cannot be reached: {reason}")
    except ValueError:
        return Check(name, "FAIL", f"{model} is neither a folder nor a model id like google/gemma-3-4b-it")
    size = sum(file.size or 0 for file in files if file.rfilename.endswith(".safetensors"))
    return Check(name, "PASS", f"{model} can be downloaded ({size / GIB:.1f} GiB)")


def is_on_this_machine(model: str) -> bool:
    """Return whether `model` is a folder, or complete in the local cache of the Hub."""
    if Path(model).is_dir():
        return True
    try:
        return not _folder_problems(Path(snapshot_download(model, local_files_only=True)))
    except (LocalEntryNotFoundError, ValueError):
        return False


def check_model_access(model: str) -> Check:
    """Fail if `model` (a folder or a Hub id) cannot be loaded: what is missing, gated, private or out of reach."""
    name = "model access"
    if not Path(model).is_dir():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            return Check(name, "FAIL", f"{model}: no such folder")
        if is_on_this_machine(model):
            return Check(name, "PASS", f"{model} is whole in the local cache")
        return _check_hub_access(model)
    problems = _folder_problems(Path(model))
    if problems:
        return Check(name, "FAIL", f"{model}: {problems[0]}", tuple(problems))
    checkpoint = open_checkpoint(model)
    text = checkpoint.config.text_config
    found = f"{checkpoint.family.name}, {text.num_hidden_layers} layers, {text.hidden_size} wide"
    return Check(name, "PASS", f"{model}: {found}; config, weights and processor whole")
