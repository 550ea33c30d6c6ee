import json
import stat
import sys

import numpy as np
import pytest
from pyarrow import parquet
from safetensors import safe_open
from vitgraph.encoder.writers import check_output, run_metadata, write_embeddings

NAMES = ["a.png", "ä b.jpg", "c/d.mp4"]
MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)
RAGGED = [np.full((n, 4), n, np.float32) for n in (2, 5, 1)]
METADATA = run_metadata(
    model="demo", revision=None, dtype="float32", pooling="mean", normalized=True, layers=[1]
)


def test_safetensors_round_trip(tmp_path):
    path = tmp_path / "out.safetensors"
    write_embeddings(path, NAMES, MATRIX, METADATA, {3: MATRIX[:, :2]})
    with safe_open(path, "np") as file:
        header = file.metadata()
        np.testing.assert_array_equal(file.get_tensor("embeddings"), MATRIX)
        np.testing.assert_array_equal(file.get_tensor("layer_3"), MATRIX[:, :2])
    assert json.loads(header["names"]) == NAMES
    assert header["model"] == "demo"
    assert json.loads(header["revision"]) is None
    assert json.loads(header["normalized"]) is True
    assert json.loads(header["layers"]) == [1]
    assert {"vitgraph", "torch", "transformers", "triton"} == set(json.loads(header["versions"]))


def test_ragged_safetensors_round_trip(tmp_path):
    path = tmp_path / "out.safetensors"
    write_embeddings(path, NAMES, RAGGED, METADATA, {3: RAGGED})
    with safe_open(path, "np") as file:
        for tokens, offsets in (("tokens", "offsets"), ("layer_3.tokens", "layer_3.offsets")):
            ends = file.get_tensor(offsets)
            assert ends.dtype == np.int64
            parts = np.split(file.get_tensor(tokens), ends[1:-1])
            for part, expected in zip(parts, RAGGED, strict=True):
                np.testing.assert_array_equal(part, expected)


def test_npy_round_trip(tmp_path):
    path = tmp_path / "out.npy"
    write_embeddings(path, NAMES, MATRIX, METADATA)
    np.testing.assert_array_equal(np.load(path), MATRIX)
    sidecar = json.loads((tmp_path / "out.npy.json").read_text())
    assert sidecar["names"] == NAMES
    assert sidecar["metadata"]["model"] == "demo"


def test_parquet_round_trip(tmp_path):
    path = tmp_path / "out.parquet"
    write_embeddings(path, NAMES, MATRIX, METADATA, {3: MATRIX[:, :2]})
    table = parquet.read_table(path)
    assert table["name"].to_pylist() == NAMES
    assert table.schema.field("embedding").type.list_size == 4
    np.testing.assert_array_equal(table["embedding"].to_pylist(), MATRIX)
    np.testing.assert_array_equal(table["layer_3"].to_pylist(), MATRIX[:, :2])
    assert table.schema.metadata[b"pooling"] == b"mean"


def test_ragged_parquet_round_trip(tmp_path):
    path = tmp_path / "out.parquet"
    write_embeddings(path, NAMES, RAGGED, METADATA)
    for row, expected in zip(
        parquet.read_table(path)["embedding"].to_pylist(), RAGGED, strict=True
    ):
        np.testing.assert_array_equal(row, expected)


def test_outputs_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'\.csv'; use \.safetensors, \.npy, \.parquet"):
        check_output(tmp_path / "out.csv")
    with pytest.raises(ValueError, match="tokens need more"):
        check_output(tmp_path / "out.npy", ragged=True)
    with pytest.raises(ValueError, match="layers need more"):
        check_output(tmp_path / "out.npy", layers=True)
    with pytest.raises(ValueError, match="there is no folder"):
        check_output(tmp_path / "nowhere" / "out.npy")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        check_output(tmp_path / "folder.npy")
    with pytest.raises(ValueError, match="2 names for 3 rows"):
        write_embeddings(tmp_path / "out.npy", NAMES[:2], MATRIX, METADATA)


def test_missing_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'vitgraph\[parquet\]'"):
        check_output(tmp_path / "out.parquet")


@pytest.mark.parametrize("suffix", ["safetensors", "npy", "parquet"])
def test_a_failed_write_leaves_the_old_file(suffix, tmp_path, monkeypatch):
    path = tmp_path / f"out.{suffix}"
    write_embeddings(path, NAMES, MATRIX, METADATA)
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space"):
        write_embeddings(path, NAMES, MATRIX + 1, METADATA)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".out*"))


def test_files_get_ordinary_permissions(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    write_embeddings(tmp_path / "out.npy", NAMES, MATRIX, METADATA)
    modes = {stat.S_IMODE(f.stat().st_mode) for f in (ordinary, tmp_path / "out.npy")}
    assert len(modes) == 1
