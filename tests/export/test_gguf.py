"""Conversion to GGUF for real, by llama.cpp's converter: all of the checkpoint arrives, and what cannot is refused."""

import io
import json
import logging
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.export import gguf, gguf_check, llama_cpp_converter
from pokegemma.export.gguf import modelfile
from pokegemma.export.gguf_reader import GgufFile, read_gguf
from pokegemma.export.gguf_source import GgufSource, read_gguf_source, served_template
from pokegemma.export.llama_cpp_converter import find_converter, unpack_converter
from pokegemma.export.weight_types import QUANTIZATIONS
from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3
from pokegemma.gemma.tiny.tokenizer import CHAT_TEMPLATE


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path) -> GgufSource:
    return read_gguf_source(tiny_model)


@pytest.fixture(scope="module")
def files(gguf_folder: Path) -> dict[str, GgufFile]:
    paths = sorted(gguf_folder.glob("*.gguf"))
    return {path.stem: read_gguf(path, find_converter(None)) for path in paths}


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what is written


def test_every_type_has_its_file_and_the_eyes_are_in_one_of_their_own(gguf_folder: Path) -> None:
    assert sorted(path.name for path in gguf_folder.iterdir()) == [
        "Modelfile-f16",
        "Modelfile-q4_k_m",
        "Modelfile-q8_0",
        "mmproj-f16.gguf",
        "model-f16.gguf",
        "model-q4_k_m.gguf",
        "model-q8_0.gguf",
        "run.json",
    ]


def test_the_files_hold_every_tensor_of_the_checkpoint(files: dict[str, GgufFile], checkpoint: GgufSource) -> None:
    # 13 a text layer, embeddings and norm; 16 a SigLIP layer, 2 + 2 around them, the position embeddings, 2 projector.
    assert (checkpoint.num_text_tensors, checkpoint.num_vision_tensors) == (6 * 13 + 2, 4 * 16 + 7)
    assert {name: len(file.shapes) for name, file in files.items()} == {
        "mmproj-f16": 71,
        "model-f16": 80,
        "model-q4_k_m": 80,
        "model-q8_0": 80,
    }


def test_pictures_and_chat_template_are_the_checkpoints(files: dict[str, GgufFile]) -> None:
    assert (files["mmproj-f16"].image_size_px, files["mmproj-f16"].image_tokens) == (56, 4)
    assert files["model-q8_0"].fields["tokenizer.chat_template"] == served_template(CHAT_TEMPLATE)


@pytest.mark.parametrize("marker", ["<__media__>", "<__media_4Kx9__>"])
def test_the_chat_template_writes_empty_lines_around_pictures_for_servers(marker: str) -> None:
    parts = [{"type": "text", "text": text} for text in ("Rules.", marker, marker, "Next button?")]
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        served_template(CHAT_TEMPLATE)
    )
    # llama-cpp-python's server hands over the parts, llama-server a text of them.
    for content in (parts, "".join(part["text"] for part in parts)):
        text = template.render(
            messages=[{"role": "user", "content": content}], add_generation_prompt=True, bos_token=""
        )
        assert text == (
            f"<start_of_turn>user\nRules.\n\n{marker}\n\n\n\n{marker}\n\nNext button?<end_of_turn>\n"
            "<start_of_turn>model\n"
        )


def test_run_json_tells_sizes_and_types(gguf_folder: Path, tiny_model: Path) -> None:
    record = json.loads((gguf_folder / "run.json").read_text())
    assert (record["stage"], record["image_tokens"]) == ("gguf", 4)
    assert record["options"] == {"model_path": str(tiny_model), "quantization": ["f16", "q8_0", "q4_k_m"]}
    assert record["files"]["model-q8_0.gguf"] == {
        "bytes": (gguf_folder / "model-q8_0.gguf").stat().st_size,
        "tensors": {"Q8_0": 43, "F32": 37},
    }


@pytest.fixture(scope="module")
def wide_files(
    to_gguf: Callable[..., gguf.Conversion], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, GgufFile]:
    """Return every type of a model whose rows have 256 and 512 weights, as k-quants need them."""
    folder = tmp_path_factory.mktemp("wide")
    make_tiny_gemma3(folder, image_size_px=56, num_image_tokens=4)
    config = Gemma3Config.from_pretrained(folder)
    config.text_config.update({"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8})
    model = Gemma3ForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder, save_original_format=False)
    done = to_gguf(folder, folder.parent / "gguf", *QUANTIZATIONS)
    return {**done.models, "mmproj": done.mmproj}


def matrix_types(file: GgufFile) -> dict[str, int]:
    return dict(Counter(file.types[name] for name, shape in sorted(file.shapes.items()) if len(shape) > 1))


@pytest.mark.slow
def test_every_matrix_has_the_type_that_its_file_names(wide_files: dict[str, GgufFile]) -> None:
    assert {name: matrix_types(file) for name, file in wide_files.items()} == {
        "f16": {"F16": 43},
        "bf16": {"BF16": 43},
        "q8_0": {"Q8_0": 43},
        "q5_k_m": {"Q5_K": 38, "Q6_K": 5},
        "q4_k_m": {"Q4_K": 38, "Q6_K": 5},
        "mmproj": {"F16": 25, "F32": 2},
    }


@pytest.mark.slow
def test_the_vectors_of_every_type_are_float32(wide_files: dict[str, GgufFile]) -> None:
    for file in wide_files.values():
        assert {file.types[name] for name, shape in file.shapes.items() if len(shape) == 1} == {"F32"}


def test_fewer_bits_are_fewer_bytes(files: dict[str, GgufFile]) -> None:
    sizes = [files[f"model-{name}"].num_bytes for name in ("f16", "q8_0", "q4_k_m")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < 0.6 * sizes[0]


def test_tensors_that_k_quants_cannot_hold_are_told(files: dict[str, GgufFile]) -> None:
    assert gguf_check.fallback_note(files["model-q4_k_m"]) == (
        "43 tensors with rows of 128, 384 are q5_0, q8_0: k-quants need multiples of 256"
    )
    assert gguf_check.fallback_note(files["model-q8_0"]) is None
    fitting = {name: (256, *shape[1:]) for name, shape in files["model-q4_k_m"].shapes.items()}
    assert gguf_check.fallback_note(replace(files["model-q4_k_m"], shapes=fitting)) is None


def test_the_modelfile_names_both_files_and_matches_the_chat_template() -> None:
    text = modelfile("model-q8_0.gguf", "mmproj-f16.gguf")
    assert text.startswith("FROM ./model-q8_0.gguf\nFROM ./mmproj-f16.gguf\nTEMPLATE ")
    assert "<start_of_turn>{{ $message.Role }}\n{{ $message.Content }}<end_of_turn>\n" in text
    assert "<start_of_turn>model\n{{ $message.Content }}" in text
    assert text.endswith("PARAMETER stop <end_of_turn>\nPARAMETER temperature 0\nPARAMETER num_ctx 8192\n")


# --- what got lost is noticed


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda mmproj: {"shapes": dict(list(mmproj.shapes.items())[1:])}, "70, the checkpoint has 71"),
        (lambda mmproj: {"fields": mmproj.fields | {"clip.vision.image_size": 896}}, "image size: 896"),
        (lambda mmproj: {"fields": mmproj.fields | {"clip.vision.projector.scale_factor": 1}}, "tokens a picture: 16"),
    ],
)
def test_a_mmproj_that_is_not_the_checkpoints_is_refused(
    files: dict[str, GgufFile], checkpoint: GgufSource, damage: Callable, error: str
) -> None:
    mmproj, models = files["mmproj-f16"], {"f16": files["model-f16"]}
    gguf_check.check_gguf_files(checkpoint, models, mmproj)
    with pytest.raises(CheckFailedError, match=error):
        gguf_check.check_gguf_files(checkpoint, models, replace(mmproj, **damage(mmproj)))


def test_all_that_got_lost_in_a_language_model_is_told_at_once(
    files: dict[str, GgufFile], checkpoint: GgufSource
) -> None:
    whole = files["model-q8_0"]
    fewer = replace(
        whole,
        shapes=dict(list(whole.shapes.items())[:-1]),
        fields={"tokenizer.chat_template": "{{ x }}"},
        control_tokens=whole.control_tokens - {"<start_of_turn>"},
    )
    with pytest.raises(CheckFailedError) as caught:
        gguf_check.check_gguf_files(checkpoint, {"f16": files["model-f16"], "q8_0": fewer}, files["mmproj-f16"])
    assert "model-q8_0.gguf: tensors of the language model: 79, the checkpoint has 80; " in str(caught.value)
    assert "its chat template is not the checkpoint's; " in str(caught.value)
    assert "model-q8_0.gguf: <start_of_turn> would be read as text; " in str(caught.value)
    assert "model-f16.gguf:" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "types", "error"),
    [
        ("f16", "F32", "43 F32 are not what f16 has"),
        ("bf16", "F16", "43 F16 are not what bf16 has"),
        ("q8_0", "F16", "43 F16 are not what q8_0 has"),
        ("q4_k_m", "Q8_0", "43 Q8_0 are not what q4_k_m has"),
        ("q4_k_m", "Q6_K", "43 Q6_K are not what q4_k_m has"),
        ("q5_k_m", "Q4_K", "43 Q4_K are not what q5_k_m has"),
    ],
)
def test_a_file_of_another_type_than_it_names_is_refused(
    name: str, types: str, error: str, files: dict[str, GgufFile], checkpoint: GgufSource
) -> None:
    shapes = {tensor: tuple(256 for _ in shape) for tensor, shape in files["model-f16"].shapes.items()}
    kinds = {tensor: types if len(shape) > 1 else "F32" for tensor, shape in shapes.items()}
    other = replace(files["model-f16"], shapes=shapes, types=kinds)
    with pytest.raises(CheckFailedError, match=error):
        gguf_check.check_gguf_files(checkpoint, {name: other}, files["mmproj-f16"])


def test_a_mmproj_in_float32_is_refused(files: dict[str, GgufFile], checkpoint: GgufSource) -> None:
    mmproj = files["mmproj-f16"]
    with pytest.raises(CheckFailedError, match=r"mmproj-f16\.gguf: its tensors are F32, not F16"):
        gguf_check.check_gguf_files(
            checkpoint, {"f16": files["model-f16"]}, replace(mmproj, types=dict.fromkeys(mmproj.types, "F32"))
        )


def test_a_truncated_file_is_no_gguf_file(gguf_folder: Path, tmp_path: Path) -> None:
    whole = (gguf_folder / "model-f16.gguf").read_bytes()
    for length in (3, len(whole) // 20, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(PokegemmaError, match=r"cut\.gguf is not a whole GGUF file"):
            read_gguf(tmp_path / "cut.gguf", find_converter(None))


# --- what cannot be converted


def without_vision_tower(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "vision_tower" not in k}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda folder: (folder / "adapter_config.json").touch(), "is an adapter; merge it first: scripts/merge_qlora"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer.model not found, which llama.cpp needs"),
        (without_vision_tower, "vision tower"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gemma4"}'), "is a Gemma 4; only Gemma 3"),
        (lambda folder: change_config(folder, model_type="gemma4"), "the config could not be loaded"),
        (lambda folder: change_config(folder, model_type="gemma3_text"), "gemma3_text"),
        (lambda folder: change_config(folder, quantization_config={"quant_method": "x"}), "its weights are quantised"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "the weights cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "config"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(copy: Path, damage: Callable, error: str) -> None:
    damage(copy)
    with pytest.raises(PokegemmaError) as caught:
        read_gguf_source(copy)
    assert error in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PokegemmaError, match=r"--model_path .*/none: no such folder"):
        read_gguf_source(tmp_path / "none")


def test_the_output_may_not_hold_the_model(copy: Path) -> None:
    with pytest.raises(PokegemmaError, match=r"--output_dir .* contains the input"):
        gguf.convert_to_gguf(copy, copy.parent, quantizations=["f16"], converter=find_converter(None))
    assert (copy / "model.safetensors").is_file()


def test_a_disk_without_room_is_refused_before_anything_is_converted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(PokegemmaError, match=r"GiB needed, 0\.0 GiB free on this disk"):
        gguf.convert_to_gguf(tiny_model, tmp_path / "out", quantizations=["f16"], converter=find_converter(None))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow(5)
def test_a_failed_converter_is_reported_with_its_last_lines_and_no_files_remain(copy: Path) -> None:
    (copy / "tokenizer.model").write_bytes(b"broken")
    with pytest.raises(PokegemmaError) as caught:
        gguf.convert_to_gguf(copy, copy.parent / "out", quantizations=["f16"], converter=find_converter(None))
    assert "llama.cpp's converter failed (exit status 1): " in str(caught.value)
    assert "could not parse ModelProto from tokenizer.model" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in copy.parent.iterdir()) == ["copy"]


def test_a_model_with_causal_pictures_is_converted_with_a_warning(
    copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for attention, warnings in (("bidirectional", 0), ("causal", 1)):
        change_config(copy, image_attention=attention)
        with pytest.raises(PokegemmaError, match="converter failed"):  # an empty folder converts nothing, and is fast
            gguf.convert_to_gguf(copy, tmp_path / "out", quantizations=["f16"], converter=tmp_path)
        assert caplog.text.count("llama.cpp attends both ways") == warnings


# --- the converter


def test_a_folder_without_converter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PokegemmaError, match=r"--llama_cpp_dir .*: .*convert_hf_to_gguf.py"):
        find_converter(tmp_path)
    monkeypatch.setattr(llama_cpp_converter, "CONVERTER_FOLDER", tmp_path / "share")
    with pytest.raises(PokegemmaError, match=r"converter is not in .*/share; fetch it: ./init.sh --with gguf"):
        find_converter(None)


def write_package(path: Path, members: dict[str, str | None]) -> Path:
    """Write a tar.gz; a member without text is a link to /etc/passwd."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            if text is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            member.size = len(text or "")
            archive.addfile(member, io.BytesIO((text or "").encode()))
    return path


WHOLE = {
    f"llama-0.1/vendor/llama.cpp/{name}": name
    for name in ("convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/__init__.py", "LICENSE")
}


def test_only_the_converter_is_unpacked_and_nothing_outside_the_folder(tmp_path: Path) -> None:
    inside = "llama-0.1/vendor/llama.cpp/"
    others = {
        f"{inside}src/llama.cpp": "not needed",
        "llama-0.1/LICENSE": "another one",
        f"{inside}conversion/../../../../../escaped.py": "bad",
        f"{inside}conversion/link.py": None,
        "/vendor/llama.cpp/conversion/absolute.py": "bad",
    }
    package = write_package(tmp_path / "llama_cpp_python-0.1.tar.gz", WHOLE | others)
    unpack_converter(package, tmp_path / "a" / "b")
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if not p.is_dir()} - {package.name}
    assert found == {f"a/b/{name}" for name in WHOLE.values()} | {"a/b/run.json"}
    assert json.loads((tmp_path / "a/b/run.json").read_text()) == {"stage": "llama.cpp", "version": "0.1"}
    assert (tmp_path / "a/b/LICENSE").read_text() == "LICENSE"
    assert find_converter(tmp_path / "a" / "b") == tmp_path / "a" / "b"


def test_a_damaged_package_leaves_the_converter_that_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "converter"
    unpack_converter(write_package(tmp_path / "p-1.tar.gz", WHOLE), folder)
    whole = (tmp_path / "p-1.tar.gz").read_bytes()
    (tmp_path / "p-2.tar.gz").write_bytes(whole[: len(whole) // 2])
    write_package(tmp_path / "p-3.tar.gz", dict(list(WHOLE.items())[1:]))
    for name, error in (("p-2", "p-2"), ("p-3", "convert_hf_to_gguf.py")):
        with pytest.raises(PokegemmaError, match=error):
            unpack_converter(tmp_path / f"{name}.tar.gz", folder)
    assert json.loads((folder / "run.json").read_text())["version"] == "1"
