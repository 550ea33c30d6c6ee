import json
import sys
from importlib.util import find_spec

import pytest
import torch
from vitgraph.bench import peers
from vitgraph.bench.__main__ import main
from vitgraph.bench.contest import PEERS

CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """torch's FlashAttention-2 is usable; vLLM is whatever the test makes of it."""
    monkeypatch.setattr(peers, "backend_report", lambda device: {"torch": None})
    modules = {}
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: modules.get("vllm") if name == "vllm" else find_spec(name, *rest),
    )
    return modules


def test_without_a_gpu_one_peer_is_left():
    found, missing = peers.installed_peers(torch.device("cpu"))
    assert found == ["hf-eager-sdpa"]
    assert set(missing) == set(PEERS) - set(found)
    assert "needs a CUDA device" in missing["vllm-graph"]


def test_vllm_is_missing(gpu):
    found, missing = peers.installed_peers(CUDA)
    assert found == [name for name in PEERS if name.startswith("hf-")]
    assert missing == dict.fromkeys(("vllm-eager", "vllm-graph"), "vllm is not installed")


def test_vllm_that_does_not_import_is_missing(gpu, monkeypatch):
    gpu["vllm"] = "a spec"
    monkeypatch.setitem(sys.modules, "vllm", None)
    _, missing = peers.installed_peers(CUDA)
    assert missing["vllm-eager"].startswith("vllm does not import: ModuleNotFoundError")
    monkeypatch.setitem(sys.modules, "vllm", object())
    found, missing = peers.installed_peers(CUDA)
    assert (found, missing) == (list(PEERS), {})


def test_flash_attention_of_torch_is_missing(gpu, monkeypatch):
    monkeypatch.setattr(peers, "backend_report", lambda device: {"torch": "too old"})
    _, missing = peers.installed_peers(CUDA)
    assert {name for name, reason in missing.items() if reason == "too old"} == {
        "hf-eager-fa2", "hf-exact-graph", "hf-compile-graph",
    }  # fmt: skip


def test_command_runs_what_is_there_and_says_what_is_not(tmp_path, capsys):
    path = tmp_path / "peers.json"
    options = ["--towers", "tiny-qwen2-vl", "--workloads", "mix1", "--device", "cpu", "--quick"]
    assert main(["peers", *options, "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    names = [row["provider"] for row in written["rows"]]
    assert names == ["hf-eager-sdpa", "ours-eager", "ours-graph", "ours"]
    assert "CUDA device" in written["meta"]["missing"]["hf-exact-graph"]
    assert "missing vllm-graph: needs a CUDA device" in capsys.readouterr().out
