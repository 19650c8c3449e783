import http.server
import json
import shutil
import threading

import pytest
from huggingface_hub import HfApi

from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3
from pokegemma.training.preflight import model_access
from pokegemma.training.preflight.model_access import check_model_access

MODEL = "google/gemma-3-4b-it"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_gemma3(folder, image_size_px=56, num_image_tokens=16)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture
def hub(monkeypatch):
    """Pretend an empty cache, and run a Hub that refuses every model as told: hub(403, "GatedRepo")."""
    refusals = []

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, code = refusals[-1]
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *message):
            pass

    monkeypatch.setattr(model_access.constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(model_access, "is_on_this_machine", lambda model: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(model_access, "HfApi", lambda: HfApi(endpoint=endpoint))
        yield lambda status, code: refusals.append((status, code))
        server.shutdown()


def test_a_whole_folder_passes(folder):
    check = check_model_access(str(folder))
    assert check.status == "PASS"
    assert "6 layers, 128 wide" in check.summary


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_fails_and_is_named(folder, name):
    (folder / name).unlink()
    check = check_model_access(str(folder))
    assert check.status == "FAIL"
    assert check.status == "FAIL" and str(folder) in check.summary and name in check.summary


def test_a_missing_processor_fails(folder):
    (folder / "processor_config.json").unlink()
    check = check_model_access(str(folder))
    assert check.status == "FAIL"
    assert "processor could not be loaded" in check.summary


def test_truncated_weights_fail(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    check = check_model_access(str(folder))
    assert check.status == "FAIL"
    assert "model.safetensors is damaged" in check.summary


def test_a_shard_that_the_index_names_must_be_there(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check_model_access(str(folder)).status == "PASS"  # transformers reads the one file
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index["weight_map"]["a"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check = check_model_access(str(folder))
    assert check.status == "FAIL" and "model-00002-of-00002.safetensors" in check.summary


def test_a_path_that_is_not_there_is_not_taken_for_a_model_id():
    assert check_model_access("./outputs/none").summary == "./outputs/none: no such folder"


def test_offline_says_so(monkeypatch):
    monkeypatch.setattr(model_access.constants, "is_offline_mode", lambda: True)
    monkeypatch.setattr(model_access, "is_on_this_machine", lambda model: False)
    check = check_model_access(MODEL)
    assert check.status == "FAIL"
    assert "HF_HUB_OFFLINE forbids" in check.summary


def test_a_gated_model_says_what_to_do(hub):
    hub(403, "GatedRepo")
    summary = check_model_access(MODEL).summary
    assert "accept its licence at https://huggingface.co/google/gemma-3-4b-it" in summary
    assert "HUGGINGFACE_TOKEN" in summary


def test_a_hub_that_cannot_be_reached_fails_in_one_line(monkeypatch):
    monkeypatch.setattr(model_access.constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(model_access, "is_on_this_machine", lambda model: False)
    # Nobody listens on port 9; the real library is asked, since its errors change with its HTTP client.
    monkeypatch.setattr(model_access, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("no_proxy", "*")
    check = check_model_access(MODEL)
    assert check.status == "FAIL"
    assert "cannot be reached: [Errno 111] Connection refused" in check.summary


def test_an_unknown_model_and_a_hub_out_of_reach_fail_differently(hub):
    hub(404, "RepoNotFound")
    assert "no such model on the Hugging Face Hub" in check_model_access("google/gemma-9").summary
    hub(500, "")
    assert "cannot be reached: Server error '500" in check_model_access(MODEL).summary
