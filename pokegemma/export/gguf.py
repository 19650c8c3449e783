"""Convert a checkpoint to GGUF with llama.cpp's own converter, quantise it, and check that nothing was lost.

A Gemma 3 becomes two kinds of files: the language model, in as many types as asked for, and `mmproj`, which contains
the vision tower and the projector in float16. One for text alone has no second file.
"""

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pokegemma.errors import PokegemmaError
from pokegemma.export.gguf_check import check_gguf_files
from pokegemma.export.gguf_reader import GgufFile, read_gguf
from pokegemma.export.gguf_source import read_gguf_source, staged
from pokegemma.export.llama_cpp_converter import CONVERTER
from pokegemma.export.weight_types import Quantization
from pokegemma.outputs import atomic_folder, refuse_to_replace, require_space
from pokegemma.provenance import read_run_record, write_run_record

logger = logging.getLogger(__name__)

MMPROJ = "mmproj-f16.gguf"

_CONVERTED = ("f16", "bf16")
"""Types that the converter writes; the others are quantised from one of these."""

_BITS = {"f16": 16, "bf16": 16, "q8_0": 8.5, "q5_k_m": 5.7, "q4_k_m": 4.9}
"""About how many bits a weight takes, for the disk; what was written is measured."""


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


def model_name(quantization: str) -> str:
    """Return the name of the language model's file."""
    return f"model-{quantization}.gguf"


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


def run_converter(converter: Path, model: Path, output: Path, *options: str) -> None:
    """Run llama.cpp's converter; its progress goes to stderr.

    Raises:
        PokegemmaError: it failed; the message has the last lines of its output.
    """
    command = [sys.executable, str(converter / CONVERTER), str(model), "--outfile", str(output), *options]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    output_lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Writing:"):  # its progress bar; each state of it comes as a line
                sys.stderr.write(f"\r{line.rstrip()}" + "\n" * (" 100%" in line))
            else:
                output_lines = [*output_lines[-20:], line.strip()]
        status = process.wait()
    finally:
        process.kill()
        process.wait()
    if status != 0:
        last = " | ".join([line for line in output_lines if line][-3:]).replace(f"{model}/", "")
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
    mmproj: GgufFile | None  # None: a model for text alone


def _convert_vision(converter: Path, model: Path, output: Path) -> GgufFile:
    logger.info("converting the vision tower and projector")
    run_converter(converter, model, output, "--mmproj", "--outtype", "f16")
    return read_gguf(output, converter)


def convert_to_gguf(
    model_path: Path, output: Path, *, quantizations: list[Quantization], converter: Path, overwrite: bool = False
) -> Conversion:
    """Write the language model in each of the types and, with vision, mmproj-f16.gguf and a Modelfile for each type.

    Quantised files are made from the f16 one, or from bf16 where that was asked for and f16 was not; where neither was,
    f16 is made on the way and removed.

    Args:
        converter: what `find_converter` returned.

    Raises:
        PokegemmaError: the checkpoint cannot be converted, the converter failed, or the disk is full.
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
        mmproj = _convert_vision(converter, staging, folder / MMPROJ) if checkpoint.has_vision else None
        for name in types:
            logger.info("%s the language model: %s", "converting" if name in _CONVERTED else "quantising", name)
            if name in _CONVERTED:
                run_converter(converter, staging, folder / model_name(name), "--outtype", name)
            else:
                _quantize(folder / model_name(source), folder / model_name(name), name)
        files = {name: read_gguf(folder / model_name(name), converter) for name in types}
        check_gguf_files(checkpoint, files, mmproj)
        if source not in wanted:
            (folder / model_name(source)).unlink()
        files = {name: files[name] for name in wanted}
        for name in wanted if mmproj else ():
            (folder / f"Modelfile-{name}").write_text(modelfile(model_name(name), MMPROJ), encoding="utf-8")
        write_run_record(
            folder,
            stage="gguf",
            options={"model_path": str(model_path), "quantization": wanted},
            model_type=checkpoint.checkpoint.config.model_type,
            image_size_px=checkpoint.image_size_px,
            image_tokens=checkpoint.image_tokens,
            converter=str(converter),
            files={
                file.path.name: {"bytes": file.num_bytes, "tensors": file.type_counts}
                for file in (*files.values(), mmproj)
                if file is not None
            },
            model=read_run_record(model_path),
        )
    return Conversion(models=files, mmproj=mmproj)
