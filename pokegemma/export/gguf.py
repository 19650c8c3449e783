"""Convert a checkpoint to GGUF with llama.cpp's own converter, quantise it, and check that nothing was lost.

A Gemma 3 becomes two kinds of files: the language model, in as many types as asked for, and `mmproj`, its eyes: vision
tower and projector, in float16.
"""

import json
import logging
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.export.gguf_reader import GgufFile, read_gguf
from pokegemma.export.gguf_source import GgufSource, read_gguf_source, staged
from pokegemma.export.llama_cpp_converter import CONVERTER
from pokegemma.outputs import atomic_folder, refuse_to_replace, require_space
from pokegemma.provenance import read_run_record, write_run_record

logger = logging.getLogger(__name__)

Quantization = Literal["f16", "bf16", "q8_0", "q5_k_m", "q4_k_m"]
MMPROJ = "mmproj-f16.gguf"

_K_BLOCK = 256
_CONVERTED = ("f16", "bf16")
"""Types that the converter writes; the others are quantised from one of these."""

_MATRIX_TYPES = {
    "f16": {"F16"},
    "bf16": {"BF16"},
    "q8_0": {"Q8_0"},
    "q5_k_m": {"Q5_K", "Q6_K"},
    "q4_k_m": {"Q4_K", "Q5_K", "Q6_K"},
}
"""Types of the matrices in a file: "m" mixes in some of more bits. Vectors are float32 in all of them."""

_BITS = {"f16": 16, "bf16": 16, "q8_0": 8.5, "q5_k_m": 5.7, "q4_k_m": 4.9}
"""About how many bits a weight takes, for the disk; what was written is measured."""


def model_name(quantization: str) -> str:
    """Return the name of the language model's file."""
    return f"model-{quantization}.gguf"


def run_converter(converter: Path, model: Path, output: Path, *options: str) -> None:
    """Run llama.cpp's converter; its progress goes to stderr.

    Raises:
        PokegemmaError: it failed, with the last lines that it said.
    """
    command = [sys.executable, str(converter / CONVERTER), str(model), "--outfile", str(output), *options]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    said: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Writing:"):  # its progress bar; each state of it comes as a line
                sys.stderr.write(f"\r{line.rstrip()}" + "\n" * (" 100%" in line))
            else:
                said = [*said[-20:], line.strip()]
        status = process.wait()
    finally:
        process.kill()
        process.wait()
    if status != 0:
        last = " | ".join([line for line in said if line][-3:]).replace(f"{model}/", "")
        raise PokegemmaError(f"{model.name}: llama.cpp's converter failed (exit status {status}): {last[-600:]}")


def _quantize(source: Path, output: Path, quantization: str) -> None:
    """Quantise a converted language model through llama.cpp's library.

    Raises:
        PokegemmaError: it failed.
    """
    import llama_cpp

    from pokegemma.engines.llama_cpp_log import captured_log

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization.upper()}")
    with captured_log() as errors:
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), options)
    if status != 0:
        raise PokegemmaError(f"{output.name}: llama.cpp could not quantise: {errors.last or f'status {status}'}")


def _is_k_quant(quantization: str) -> bool:
    return "_k" in quantization


def wrong_types(file: GgufFile, quantization: str) -> dict[str, int]:
    """Return how many matrices of a file have types that its quantization has not; empty where all are as they should.

    Matrices that k-quants cannot hold may have any type, see `fallback_note`.
    """
    counts = Counter(
        file.types[name]
        for name, shape in file.shapes.items()
        if len(shape) > 1 and not (_is_k_quant(quantization) and shape[0] % _K_BLOCK)
    )
    named = {"q5_k_m": "Q5_K", "q4_k_m": "Q4_K"}.get(quantization)
    if named in counts or named is None:  # mixtures of more bits alone would be another quantization
        counts = Counter({kind: n for kind, n in counts.items() if kind not in _MATRIX_TYPES[quantization]})
    return dict(counts)


def check_gguf_files(checkpoint: GgufSource, models: dict[str, GgufFile], mmproj: GgufFile) -> None:
    """Check that the files hold what the checkpoint holds.

    Raises:
        CheckFailedError: tensors, their types, the chat template or the pictures differ; all that does is said.
    """
    wrong = []

    def expect(file: GgufFile, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            wrong.append(f"{file.path.name}: {what}: {found}, the checkpoint has {expected}")

    expect(mmproj, "tensors of the vision tower and projector", len(mmproj.shapes), checkpoint.num_vision_tensors)
    if not set(mmproj.types.values()) <= {"F16", "F32"} or "F16" not in mmproj.types.values():
        wrong.append(f"{mmproj.path.name}: its tensors are {', '.join(mmproj.type_counts)}, not F16")
    expect(mmproj, "image size", mmproj.image_size_px, checkpoint.image_size_px)
    expect(mmproj, "tokens a picture", mmproj.image_tokens, checkpoint.image_tokens)
    first = next(iter(models.values()))
    for quantization, model in models.items():
        if types := wrong_types(model, quantization):
            found = ", ".join(f"{count} {kind}" for kind, count in sorted(types.items()))
            wrong.append(f"{model.path.name}: {found} are not what {quantization} has")
        expect(model, "tensors of the language model", len(model.shapes), checkpoint.num_text_tensors)
        template = model.fields.get("tokenizer.chat_template")
        if template != checkpoint.chat_template:
            wrong.append(f"{model.path.name}: its chat template is not the checkpoint's")
        if text := [token for token in checkpoint.control_tokens if token not in model.control_tokens]:
            wrong.append(f"{model.path.name}: {', '.join(text)} would be read as text")
        if model.shapes != first.shapes:
            wrong.append(f"{model.path.name}: its tensors are not those of {first.path.name}")
    if wrong:
        raise CheckFailedError(f"{checkpoint.path} was not converted whole: {'; '.join(wrong)}")


def _warn_of_causal_pictures(path: Path) -> None:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if config.get("image_attention") == "causal":
        logger.warning(
            "warning: %s was trained with causal attention inside pictures, llama.cpp attends both ways there: "
            "answers will differ; train without it for llama.cpp, or use MLX",
            path,
        )


@dataclass(frozen=True)
class Conversion:
    """The files that were written."""

    models: dict[str, GgufFile]  # by quantization, in the order asked for
    mmproj: GgufFile


def convert(
    model_path: Path, output: Path, *, quantizations: list[Quantization], converter: Path, overwrite: bool = False
) -> Conversion:
    """Write the language model in each of the types, mmproj-f16.gguf, and a Modelfile for each type.

    Quantised files are made from the f16 one, or from bf16 where that was asked for and f16 was not; where neither was,
    f16 is made on the way and removed.

    Args:
        converter: what `find_converter` returned.

    Raises:
        PokegemmaError: the checkpoint, the converter or the disk is at fault.
        CheckFailedError: something of the checkpoint is missing in the files; nothing is left at `output`.
    """
    checkpoint = read_gguf_source(model_path)
    refuse_to_replace(output, model_path)
    wanted = list(dict.fromkeys(quantizations))
    source = "bf16" if "bf16" in wanted and "f16" not in wanted else "f16"
    types = list(dict.fromkeys([source, *wanted]))
    num_bytes = int(1.05 * checkpoint.num_weights * sum(_BITS[name] for name in types) / 8)
    num_bytes += checkpoint.num_staged_bytes
    require_space(output, num_bytes, remedy="free some, or ask for fewer types with --quantization")
    _warn_of_causal_pictures(model_path)
    with (
        atomic_folder(output, stage="gguf", overwrite=overwrite) as folder,
        staged(checkpoint, beside=folder) as staging,
    ):
        logger.info("converting the vision tower and projector")
        run_converter(converter, staging, folder / MMPROJ, "--mmproj", "--outtype", "f16")
        for name in types:
            logger.info("%s the language model: %s", "converting" if name in _CONVERTED else "quantising", name)
            if name in _CONVERTED:
                run_converter(converter, staging, folder / model_name(name), "--outtype", name)
            else:
                _quantize(folder / model_name(source), folder / model_name(name), name)
        files = {name: read_gguf(folder / model_name(name), converter) for name in types}
        mmproj = read_gguf(folder / MMPROJ, converter)
        check_gguf_files(checkpoint, files, mmproj)
        if source not in wanted:
            (folder / model_name(source)).unlink()
        files = {name: files[name] for name in wanted}
        for name in wanted:
            (folder / f"Modelfile-{name}").write_text(modelfile(model_name(name), MMPROJ), encoding="utf-8")
        write_run_record(
            folder,
            stage="gguf",
            options={"model_path": str(model_path), "quantization": wanted},
            image_size_px=checkpoint.image_size_px,
            image_tokens=checkpoint.image_tokens,
            converter=str(converter),
            files={
                file.path.name: {"bytes": file.num_bytes, "tensors": file.type_counts}
                for file in (*files.values(), mmproj)
            },
            model=read_run_record(model_path),
        )
    return Conversion(models=files, mmproj=mmproj)


def fallback_note(file: GgufFile) -> str | None:
    """Return what became of tensors that k-quants cannot hold, whose rows have to be multiples of 256; None: no such.

    llama.cpp takes another type of about the same size for them, without a word in the file's name.
    """
    if not any(name.endswith("_K") for name in file.types.values()) and not _is_k_quant(file.path.stem):
        return None
    odd = {name: shape[0] for name, shape in file.shapes.items() if len(shape) > 1 and shape[0] % _K_BLOCK}
    if not odd:
        return None
    rows = ", ".join(str(length) for length in sorted(set(odd.values())))
    types = ", ".join(sorted({file.types[name].lower() for name in odd}))
    return f"{len(odd)} tensors with rows of {rows} are {types}: k-quants need multiples of {_K_BLOCK}"


CONTEXT_TOKENS = 8192
"""Room for a conversation of 16 decisions with a picture of 256 tokens each, and for its answers."""


# Gemma 3's turns as the checkpoint's chat template writes them. Ollama adds <bos> itself, takes the last message for
# the beginning of an answer where it is the assistant's, and puts a picture where "[img]" stands in a message.
_TEMPLATE = """\
{{- range $index, $message := .Messages }}
{{- $last := eq (len (slice $.Messages $index)) 1 }}
{{- if eq $message.Role "assistant" }}<start_of_turn>model
{{ $message.Content }}{{ if not $last }}<end_of_turn>
{{ end }}
{{- else }}<start_of_turn>{{ $message.Role }}
{{ $message.Content }}<end_of_turn>
{{ if $last }}<start_of_turn>model
{{ end }}
{{- end }}
{{- end }}"""


def modelfile(model: str, mmproj: str) -> str:
    """Return a Modelfile for a language model and its mmproj, named relative to the Modelfile."""
    return (
        f"FROM ./{model}\n"
        f"FROM ./{mmproj}\n"
        f'TEMPLATE """{_TEMPLATE}"""\n'
        "PARAMETER stop <end_of_turn>\n"
        "PARAMETER temperature 0\n"
        f"PARAMETER num_ctx {CONTEXT_TOKENS}\n"
    )
