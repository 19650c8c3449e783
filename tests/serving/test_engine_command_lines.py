"""The command lines of the engines' servers, and models that are refused before one is started."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import zeros

from pokegemma.errors import PokegemmaError
from pokegemma.serving.engine_command_lines import Launch, ServerOptions, build_launch

GGUF = b"GGUF" + bytes(20)


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a folder that looks like a checkpoint's, and returns its path."""

    def write(name: str = "merged", *, weights: str = "pt", run: dict | None = None, **config: object) -> str:
        folder = tmp_path / name
        folder.mkdir()
        save_file({"a": zeros(1)}, folder / "model.safetensors", metadata={"format": weights})
        record = {"model_type": "gemma3", "mm_tokens_per_image": 256, **config}
        (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
        if run is not None:
            (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
        return str(folder)

    return write


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes files that begin as GGUF files do, and returns their folder."""

    def write(*names: str, folder: str = "gguf") -> Path:
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(GGUF)
        return tmp_path / folder

    return write


def words_after(launch: Launch, flag: str) -> str:
    return launch.command[launch.command.index(flag) + 1]


def test_transformers_serves_one_model_on_this_machine_alone(write_checkpoint: Callable[..., str]) -> None:
    model = write_checkpoint()
    launch = build_launch("transformers", model, ServerOptions(port=8123, device="cpu", dtype="float32"))
    assert launch.command == (
        "env",
        "HF_HUB_DISABLE_UPDATE_CHECK=1",
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        "8123",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    )
    assert (launch.model, launch.url, launch.ready_path) == (model, "http://127.0.0.1:8123", "/health")


def test_vllm_has_room_for_the_layout(write_checkpoint: Callable[..., str]) -> None:
    model = write_checkpoint(run={"training": {"options": {"layout": "frames"}}})
    launch = build_launch("vllm", model, ServerOptions(engine_flags=("--tensor-parallel-size", "2")))
    assert launch.command[-3:] == ('{"do_pan_and_scan": false}', "--tensor-parallel-size", "2")
    assert launch.command[:-3] == (
        "vllm",
        "serve",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        "8000",
        "--served-model-name",
        model,
        "--dtype",
        "bfloat16",
        "--max-model-len",
        "3072",
        "--limit-mm-per-prompt",
        '{"image": 4}',
        "--disable-chunked-mm-input",
        "--generation-config",
        "vllm",
        "--enable-prefix-caching",
        "--mm-processor-kwargs",
    )
    assert "pip install vllm" in launch.missing


@pytest.mark.parametrize(
    ("run", "config", "tokens", "pictures"),
    [
        ({"options": {"layout": "grid"}}, {}, "2048", 1),
        ({"options": {"layout": "trajectory", "max_decisions": 4}}, {"mm_tokens_per_image": 64}, "3072", 8),
        (None, {}, "9216", 20),
        (None, {"text_config": {"max_position_embeddings": 8192}}, "8192", 20),
    ],
)
def test_context_and_pictures_follow_the_layout(
    run: dict | None, config: dict, tokens: str, pictures: int, write_checkpoint: Callable[..., str]
) -> None:
    launch = build_launch("vllm", write_checkpoint(run=run, **config), ServerOptions())
    assert words_after(launch, "--max-model-len") == tokens
    assert json.loads(words_after(launch, "--limit-mm-per-prompt")) == {"image": pictures}


def test_llama_cpp_takes_whole_pictures_and_penalises_no_repetition(
    write_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    folder = write_gguf("model-q8_0.gguf", "model-f16.gguf", "mmproj-f16.gguf")
    launch = build_launch("llama.cpp", str(folder), ServerOptions(quantization="q8_0", log_probabilities=5))
    assert launch.command[:10] == (
        # HOST of the environment would win over --host.
        "env",
        "-u",
        "HOST",
        "-u",
        "PORT",
        "-u",
        "CONFIG_FILE",
        sys.executable,
        "-m",
        "llama_cpp.server",
    )
    pairs = dict(zip(launch.command[10::2], launch.command[11::2], strict=True))
    assert pairs == {
        "--model": str(folder / "model-q8_0.gguf"),
        "--clip_model_path": str(folder / "mmproj-f16.gguf"),
        "--chat_format": "mtmd",
        "--model_alias": str(folder / "model-q8_0.gguf"),
        "--host": "127.0.0.1",
        "--port": "8000",
        "--n_ctx": "9216",
        "--n_batch": "1024",
        "--n_ubatch": "1024",
        "--n_gpu_layers": "-1",
        "--last_n_tokens_size": "0",
        "--logits_all": "true",
        "--verbose": "false",
    }


def test_a_policy_for_battles_needs_no_vision_part(
    write_gguf: Callable[..., Path], write_checkpoint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    folder = write_gguf("model-q8_0.gguf")
    with pytest.raises(PokegemmaError, match="needs one vision part"):
        build_launch("llama.cpp", str(folder), ServerOptions())
    (folder / "run.json").write_text(json.dumps({"stage": "gguf", "model_type": "gemma3_text"}))
    launch = build_launch("llama.cpp", str(folder), ServerOptions())
    assert not {"--clip_model_path", "--chat_format"} & set(launch.command)
    assert (words_after(launch, "--n_ctx"), words_after(launch, "--n_batch")) == ("1024", "512")
    launch = build_launch("vllm", write_checkpoint(model_type="gemma3_text"), ServerOptions())
    assert not {"--limit-mm-per-prompt", "--disable-chunked-mm-input", "--mm-processor-kwargs"} & set(launch.command)
    assert words_after(launch, "--max-model-len") == "1024"


def test_llama_server_on_path_is_preferred(
    write_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    folder = write_gguf("model-f16.gguf", "mmproj-f16.gguf")
    model = str(folder / "model-f16.gguf")
    launch = build_launch("llama.cpp", model, ServerOptions(context_tokens=4096))
    assert launch.command == (
        str(program),
        "--model",
        model,
        "--mmproj",
        str(folder / "mmproj-f16.gguf"),
        "--alias",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        "8000",
        "--ctx-size",
        "4096",
        "--parallel",
        "1",
        "--batch-size",
        "1024",
        "--ubatch-size",
        "1024",
        "--jinja",
        "--temp",
        "0",
        "--offline",
    )
    assert (launch.ready_path, launch.missing) == ("/health", None)
    (folder / "run.json").write_text('{"stage": "gguf", "image_tokens": 4096}')
    large = " ".join(build_launch("llama.cpp", model, ServerOptions()).command)
    assert "--batch-size 4096 --ubatch-size 4096" in large  # a whole picture must fit into one batch
    with pytest.raises(PokegemmaError, match="--llama_server gone"):
        build_launch("llama.cpp", model, ServerOptions(llama_server="gone"))


def test_mlx_is_offline_so_that_no_request_can_download_a_model(write_checkpoint: Callable[..., str]) -> None:
    model = write_checkpoint(weights="mlx", image_attention="causal")
    launch = build_launch("mlx", model, ServerOptions(host="0.0.0.0", log_probabilities=20))
    assert launch.command == (
        "env",
        "HF_HUB_OFFLINE=1",
        sys.executable,
        "-m",
        "mlx_vlm",
        "server",
        "--model",
        model,
        "--host",
        "0.0.0.0",
        "--port",
        "8000",
        "--top-logprobs-k",
        "20",
    )
    assert launch.url == "http://127.0.0.1:8000"


@pytest.mark.parametrize(("single", "warns"), [([{"SpecialToken": {"id": "<bos>"}}], True), ([], False)])
def test_an_mlx_folder_whose_tokenizer_adds_a_bos_is_warned_of(
    single: list, warns: bool, write_checkpoint: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    model = write_checkpoint(weights="mlx", image_attention="causal")
    record = {"post_processor": {"single": [*single, {"Sequence": {"id": "A"}}]}}
    (Path(model) / "tokenizer.json").write_text(json.dumps(record), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        build_launch("mlx", model, ServerOptions())
    assert ("convert_to_mlx.py" in caplog.text) == warns


@pytest.mark.parametrize(
    ("engine", "attention", "warns"),
    [
        ("transformers", "causal", True),
        ("vllm", "causal", True),
        ("mlx", "causal", False),
        ("transformers", "bidirectional", False),
        ("vllm", "bidirectional", False),
        ("mlx", "bidirectional", True),
    ],
)
def test_attention_that_differs_from_training_is_warned_of(
    engine: str, attention: str, warns: bool, write_checkpoint: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    model = write_checkpoint(weights="mlx" if engine == "mlx" else "pt", image_attention=attention)
    with caplog.at_level(logging.WARNING):
        build_launch(engine, model, ServerOptions())
    assert ("inside pictures" in caplog.text) == warns


def test_a_gguf_of_a_causal_model_is_known_by_its_run_record(
    write_gguf: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_gguf("model-f16.gguf", "mmproj-f16.gguf")
    record = {"stage": "gguf", "model": {"stage": "merge", "training": {"options": {"image_attention": "causal"}}}}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    build_launch("llama.cpp", str(folder), ServerOptions())
    assert "causal" in caplog.text


@pytest.mark.parametrize("engine", ["transformers", "vllm", "mlx"])
def test_a_gguf_is_for_llama_cpp(engine: str, write_gguf: Callable[..., Path]) -> None:
    folder = write_gguf("model-f16.gguf", "mmproj-f16.gguf")
    for path in (folder, folder / "model-f16.gguf"):
        with pytest.raises(PokegemmaError, match=r"--engine llama\.cpp"):
            build_launch(engine, str(path), ServerOptions())


def test_a_folder_for_another_engine_is_refused(write_checkpoint: Callable[..., str], tmp_path: Path) -> None:
    merged, converted = write_checkpoint(), write_checkpoint("mlx", weights="mlx")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for engine, path, message in (
        ("mlx", merged, r"not converted for MLX.*scripts/convert_to_mlx\.py"),
        ("transformers", converted, "converted for MLX.*--engine mlx"),
        ("llama.cpp", merged, r"model-\*\.gguf.*scripts/convert_to_gguf\.py"),
        ("vllm", str(adapter), r"adapter.*scripts/merge_qlora\.py"),
        ("transformers", str(tmp_path / "gone"), "no such file or folder"),
        ("llama.cpp", str(tmp_path / "gone.gguf"), "no such file or folder"),
        ("transformers", str(tmp_path), r"config\.json"),
    ):
        with pytest.raises(PokegemmaError, match=message):
            build_launch(engine, path, ServerOptions())


@pytest.mark.parametrize(
    ("names", "choice", "message"),
    [
        (["model-f16.gguf"], None, "mmproj.*none"),
        (["model-f16.gguf", "mmproj-a.gguf", "mmproj-b.gguf"], None, "several"),
        (["model-f16.gguf", "model-q8_0.gguf", "mmproj-f16.gguf"], None, "--quantization: f16, q8_0"),
        (["model-f16.gguf", "mmproj-f16.gguf"], "q4_k_m", "--quantization q4_k_m: .* has f16"),
    ],
)
def test_the_choice_of_a_gguf_must_be_clear(
    names: list[str], choice: str | None, message: str, write_gguf: Callable[..., Path]
) -> None:
    with pytest.raises(PokegemmaError, match=message):
        build_launch("llama.cpp", str(write_gguf(*names)), ServerOptions(quantization=choice))


def test_files_that_are_not_models_are_refused(write_gguf: Callable[..., Path]) -> None:
    folder = write_gguf("model-f16.gguf", "mmproj-f16.gguf")
    with pytest.raises(PokegemmaError, match="projector"):
        build_launch("llama.cpp", str(folder / "mmproj-f16.gguf"), ServerOptions())
    (folder / "model-f16.gguf").write_bytes(b"<html>")
    with pytest.raises(PokegemmaError, match="not a GGUF file"):
        build_launch("llama.cpp", str(folder), ServerOptions())
