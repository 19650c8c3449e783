"""Upload a model to the Hugging Face Hub."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, get_token

# HTTPError is that of the library's HTTP client, httpx or httpx2 by version.
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from pokegemma.errors import PokegemmaError
from pokegemma.fingerprints import content_files


def check_hub(repo: str) -> None:
    """Check, before hours of work, that an upload can succeed.

    Raises:
        PokegemmaError: the name is not valid, there is no token, or HF_HUB_OFFLINE is set.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PokegemmaError(f"--push_to_hub {repo}: {error}") from error
    if "/" not in repo:
        raise PokegemmaError(f"--push_to_hub {repo}: write it as OWNER/NAME")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise PokegemmaError("--push_to_hub: HF_HUB_OFFLINE is set; unset it, or omit --push_to_hub")
    if get_token() is None:
        raise PokegemmaError("--push_to_hub: no token; run `hf auth login` once or set HF_TOKEN")


def push(
    repo: str, model: Path, *, card: str, exports: Mapping[str, Path], private: bool, endpoint: str | None = None
) -> str:
    """Upload a model's files, its card, and each export as a folder of that name; return the commit's address.

    run.json is not uploaded, since it contains paths of this machine.

    Raises:
        PokegemmaError: the Hub cannot be reached or refuses.
    """
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            for part, source in {"": model, **exports}.items():
                for path in content_files(source):
                    link = Path(folder, part, path.relative_to(source))
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(path.resolve())
            Path(folder, "README.md").write_text(card, encoding="utf-8")
            done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload from pokegemma")
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise PokegemmaError(f"--push_to_hub {repo}: {' '.join(str(error).split())[:300]}") from error
    return str(done.commit_url)
