"""scripts/make_tiny_model.py: the number of tokens of a picture."""

import json
from pathlib import Path

import pytest

from tests.processes import call_script


@pytest.mark.parametrize(("flags", "expected"), [((), (256, 224)), (("--num_image_tokens", 64), (64, 112))])
def test_a_picture_has_a_token_for_each_patch(
    flags: tuple[object, ...], expected: tuple[int, int], tmp_path: Path
) -> None:
    done = call_script("make_tiny_model", "--output_dir", tmp_path / "model", *flags)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["mm_tokens_per_image"], config["vision_config"]["image_size"]) == expected


def test_other_families_have_one_number_of_tokens(tmp_path: Path) -> None:
    flags = ("--family", "gemma4", "--num_image_tokens", 64)
    done = call_script("make_tiny_model", "--output_dir", tmp_path / "model", *flags)
    assert (done.returncode, (tmp_path / "model").exists()) == (2, False)
    assert "--num_image_tokens 64" in done.stderr
