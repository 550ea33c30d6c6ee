import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors import safe_open
from typer.testing import CliRunner
from vitgraph.capture import EncoderCudaGraphConfig
from vitgraph.encoder import Embedder
from vitgraph.encoder.cli import EXTRAS, app

DATA = Path(__file__).parents[1] / "data"
BUDGETS = "--encoder-cudagraph-token-budgets"
NO_GRAPHS = [("--no-enable-vit-cuda-graph", "--no-graphs")]
NAMES = ["astronaut.jpg", "chelsea.png", "coffee.jpg", "pan.mp4", "rocket.jpg"]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def embed(*arguments):
    return run("embed", "demo", *arguments, "--device", "cpu")


def test_a_folder_to_safetensors(tmp_path):
    output = tmp_path / "out.safetensors"
    result = embed(DATA, "-o", output)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}: 5 embeddings of width 128\n"
    assert "5/5" in result.stderr
    with safe_open(output, "np") as file:
        header = file.metadata()
        assert file.get_tensor("embeddings").shape == (5, 128)
    assert json.loads(header["names"]) == [str(DATA / name) for name in NAMES]
    assert header["model"] == "demo"
    assert header["dtype"] == "float32"
    assert header["pooling"] == "mean"


def test_options_reach_the_output(tmp_path):
    output = tmp_path / "out.npy"
    result = embed(DATA, "-o", output, "--normalize", "--limit", 2, "--pool", "max", "-q")
    assert result.exit_code == 0, result.output
    assert result.output == ""
    matrix = np.load(output)
    assert matrix.shape == (2, 128)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, rtol=1e-5)
    output = tmp_path / "out.parquet"
    result = embed(
        DATA / "pan.mp4", DATA, "-o", output, "--glob", "*.jpg", "--pool", "tokens",
        "--layers", "0,-1", "--dtype", "bfloat16", "--batch-size", 2, "--num-workers", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    table = parquet.read_table(output)
    assert table.column_names == ["name", "embedding", "layer_0", "layer_3"]
    assert [Path(n).name for n in table["name"].to_pylist()] == [
        "pan.mp4", "astronaut.jpg", "coffee.jpg", "rocket.jpg",
    ]  # fmt: skip
    assert table.schema.metadata[b"dtype"] == b"bfloat16"
    assert table.schema.metadata[b"layers"] == b"[0, 3]"


def test_pruned_tokens_and_their_offsets(tmp_path):
    whole, pruned = tmp_path / "whole.safetensors", tmp_path / "pruned.safetensors"
    tokens = ["--pool", "tokens", "--layers", "1"]
    assert embed(DATA, "-o", whole, *tokens).exit_code == 0
    result = embed(DATA, "-o", pruned, *tokens, "--pruning-rate", 0.5, "--batch-size", 2)
    assert result.exit_code == 0, result.output
    parts = []
    for path in (whole, pruned):
        with safe_open(path, "np") as file:
            rows, ends = file.get_tensor("tokens"), file.get_tensor("offsets")
            assert ends[0] == 0
            assert ends[-1] == len(rows)
            parts.append(np.split(rows, ends[1:-1]))
            header = file.metadata()
            layer = file.get_tensor("layer_1.offsets")
            # patches, which are before the merger, are not pruned
            assert np.array_equal(np.diff(layer), [4 * len(part) for part in parts[0]])
    assert json.loads(header["pruning_rate"]) == 0.5
    for name, all_of_it, kept in zip(NAMES, *parts, strict=True):
        if name != "pan.mp4":
            np.testing.assert_allclose(kept, all_of_it, rtol=1e-3, atol=1e-4)
            continue
        assert len(kept) == int(len(all_of_it) * 0.5)
        distance = np.abs(kept[:, None] - all_of_it[None]).max(-1)
        assert (distance.min(1) < 1e-4).all()
        assert (np.diff(distance.argmin(1)) > 0).all()


def test_pruned_embeddings(tmp_path):
    output = tmp_path / "out.npy"
    assert embed(DATA / "pan.mp4", "-o", output, "--pruning-rate", 0.5).exit_code == 0
    video = DATA / "pan.mp4"
    embedder = Embedder.from_pretrained("demo", device="cpu")
    tokens = embedder.encode(video, pool="tokens", pruning_rate=0.5)
    np.testing.assert_allclose(np.load(output)[0], tokens.mean(0), rtol=1e-4, atol=1e-5)
    assert np.abs(np.load(output)[0] - embedder.encode(video)).max() > 1e-3


def test_folders_below_and_hidden_files(tmp_path):
    picture = (DATA / "rocket.jpg").read_bytes()
    for name in ("b/c.jpg", "a.JPG", ".hidden.jpg", ".git/d.jpg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    for extra, expected in (([], ["a.JPG", "c.jpg"]), (["--no-recursive"], ["a.JPG"])):
        assert embed(tmp_path / "in", "-o", tmp_path / "out.npy", *extra).exit_code == 0
        names = json.loads((tmp_path / "out.npy.json").read_text())["names"]
        assert [Path(n).name for n in names] == expected


def test_one_bad_input_among_many(tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes((DATA / "rocket.jpg").read_bytes()[:3000])
    output = tmp_path / "out.npy"
    result = embed(DATA / "coffee.jpg", bad, DATA / "rocket.jpg", "-o", output)
    assert result.exit_code == 1
    assert f"error: {bad}: the image is corrupt or truncated" in result.stderr
    assert result.stdout == f"{output}: 2 embeddings of width 128, 1 failed\n"
    names = json.loads((tmp_path / "out.npy.json").read_text())["names"]
    assert [Path(n).name for n in names] == ["coffee.jpg", "rocket.jpg"]


def test_all_bad_writes_nothing(tmp_path):
    output = tmp_path / "out.npy"
    result = embed(tmp_path / "missing.jpg", "-o", output)
    assert result.exit_code == 1
    assert "no such file" in result.stderr
    assert "nothing written" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "{tmp}/out.csv"], "unknown suffix '.csv'"),
        (["-o", "{tmp}/none/out.npy"], "there is no folder"),
        (["-o", "{tmp}/out.npy", "--pool", "tokens"], "tokens need more"),
        (["-o", "{tmp}/out.npy", "--pool", "cls"], "choose from mean, max, tokens"),
        (["-o", "{tmp}/out.npy", "--dtype", "int8"], "int8"),
        (["-o", "{tmp}/out.npy", "--attention", "magic"], "magic"),
        (["-o", "{tmp}/out.npy", "--graphs"], "need a CUDA device"),
        (["-o", "{tmp}/out.npy", "--enable-vit-cuda-graph"], "need a CUDA device"),
        (["-o", "{tmp}/out.npy", BUDGETS, "512"], f"{BUDGETS}: CUDA graphs need a CUDA device"),
        (["-o", "{tmp}/out.npy", "--no-graphs", BUDGETS, "512"], f"{BUDGETS}: there are no graphs"),
        (["-o", "{tmp}/out.safetensors", "--layers", "x"], "--layers x"),
        (["-o", "{tmp}/out.safetensors", "--layers", "9"], "outside this tower's blocks"),
        (["-o", "{tmp}/out.npy", "--pruning-rate", "1"], "--pruning-rate=1.0 is not a fraction"),
        (["-o", "{tmp}/out.npy", "--pruning-rate", "nan"], "--pruning-rate=nan is not a fraction"),
        (["-o", "{tmp}/out.npy", "--pruning-rate", "-0.5"], "at least 0 and less than 1"),
        (["-o", "{tmp}/out.npy", "--encoder-cudagraph-nvtx"], "-nvtx: CUDA graphs need"),
        (["-o", "{tmp}/out.npy", "{tmp}"], "no images or videos in this folder"),
    ],
)
def test_usage_errors_are_one_line(arguments, message, tmp_path):
    result = embed(DATA / "rocket.jpg", *(a.format(tmp=tmp_path) for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


class StoppedError(Exception):
    """Instead of loading a tower."""


@pytest.fixture
def graphs_of(monkeypatch, tmp_path):
    """What the command line asks the embedder for on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    asked = []

    def from_pretrained(model, *, graphs, pruning, **others):
        asked.append((graphs, pruning))
        raise StoppedError

    monkeypatch.setattr(Embedder, "from_pretrained", from_pretrained)

    def ask(*arguments, pruning=False):
        result = run(
            "embed", "demo", DATA / "rocket.jpg", "-o", tmp_path / "out.safetensors",
            "--device", "cuda:0", *arguments,
        )  # fmt: skip
        assert isinstance(result.exception, StoppedError), result.output
        graphs, pruned = asked.pop()
        assert pruned is pruning
        return graphs

    return ask


def test_graphs_on_a_gpu(graphs_of):
    assert graphs_of() is None
    for long, short in (("--enable-vit-cuda-graph", "--graphs"), *NO_GRAPHS):
        assert graphs_of(long) is graphs_of(short) is (not long.startswith("--no"))
    assert graphs_of("--layers", "0") is False
    assert graphs_of("--pruning-rate", "0.5", pruning=True) is None
    assert graphs_of("--pruning-rate", "0", BUDGETS, "64", pruning=True).token_budgets == (64,)


def test_graph_options_reach_the_configuration(graphs_of):
    prefix = "--encoder-cudagraph"
    config = graphs_of(
        "--enable-vit-cuda-graph", BUDGETS, "512,1024", BUDGETS, "[64, 512]",
        f"{prefix}-max-vision-items-per-batch", 8, f"{prefix}-max-frames-per-batch", 32,
        f"{prefix}-modality", "video", f"{prefix}-num-slots", 2, f"{prefix}-calibrate",
        f"{prefix}-max-bytes", "8GiB", f"{prefix}-nvtx",
    )  # fmt: skip
    assert config == EncoderCudaGraphConfig(
        (64, 512, 1024), 8, 32, "video", num_slots=2, calibrate=True, max_bytes=2**33, nvtx=True
    )
    assert graphs_of(BUDGETS, "512") == EncoderCudaGraphConfig((512,))
    assert graphs_of(f"{prefix}-modality", "image") == EncoderCudaGraphConfig(modality="image")


def test_a_capture_that_fails_names_options(monkeypatch, tmp_path):
    def from_pretrained(model, **options):
        raise ValueError("capture: max_bytes=1 is less than the smallest rung takes")

    monkeypatch.setattr(Embedder, "from_pretrained", from_pretrained)
    result = embed(DATA, "-o", tmp_path / "out.npy")
    assert result.exit_code == 2
    assert "capture: --encoder-cudagraph-max-bytes=1 is less" in result.stderr


def test_an_unknown_model_and_option(tmp_path):
    result = run("embed", "no such model", DATA / "rocket.jpg", "-o", tmp_path / "out.npy")
    assert result.exit_code == 2
    assert "no such model" in result.stderr
    assert result.stderr.count("\n") == 1
    assert embed(DATA, "-o", tmp_path / "out.npy", "--batch-size", 0).exit_code == 2
    assert embed(DATA).exit_code == 2


def test_info():
    result = run("info", "demo", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["spec"]["depth"] == 4
    assert report["versions"]["torch"]
    assert "reference" in report["attention"]
    text = run("info")
    assert text.exit_code == 0
    assert "attention backends" in text.stdout
    assert "vitgraph[fa4]  no speed on Hopper" in text.stdout
    assert report["families"]["qwen3_5"] == "Qwen3.5, Qwen3.6, Qwen4-Exp"
    assert "  qwen2_5_omni  Qwen2.5-Omni" in text.stdout.splitlines()
    assert run("info", "no such model").exit_code == 2


def test_what_an_extra_gains_is_said_of_one_that_exists():
    root = Path(__file__).parents[2]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert EXTRAS.keys() <= declared["optional-dependencies"].keys()


def test_help_does_not_import_torch():
    code = (
        "import sys\n"
        "from vitgraph.encoder.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"embed", "info", "bench"} <= set(done.stdout.split())


def test_python_dash_m(tmp_path):
    command = [sys.executable, "-m", "vitgraph.encoder", "embed", "demo"]
    arguments = [DATA / "rocket.jpg", "-o", tmp_path / "out.npy", "--device", "cpu"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "out.npy").shape == (1, 128)
