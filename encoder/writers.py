"""Embeddings to a file: .safetensors, .npy or .parquet, whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".safetensors", ".npy", ".parquet")

# Readers of safetensors refuse headers above 100 MB.
MAX_HEADER_BYTES = 90_000_000

Rows = np.ndarray | Sequence[np.ndarray]  # [N, D], or ragged: N of [m_i, D]


def check_output(path: str | Path, *, ragged: bool = False, layers: bool = False) -> None:
    """Refuse an output that could not be written, before the work is done.

    Args:
        path: The output.
        ragged: Whether items have several rows each.
        layers: Whether there is more than one matrix.

    Raises:
        ValueError: unknown suffix, a format that cannot hold this, or a folder that is missing or
            not writable.
        ImportError: pyarrow is missing.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"output {path}: unknown suffix {path.suffix!r}; use {', '.join(SUFFIXES)}"
        )
    if path.suffix == ".npy" and (ragged or layers):
        raise ValueError(
            f"output {path}: .npy holds one matrix, and {'tokens' if ragged else 'layers'} need "
            "more; use .safetensors or .parquet"
        )
    if path.suffix == ".parquet":
        _pyarrow()
    if path.is_dir():
        raise ValueError(f"output {path}: is a folder; give a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"output {path}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"output {path}: the folder {path.parent} is not writable")


def write_embeddings(
    path: str | Path,
    names: Sequence[str],
    embeddings: Rows,
    metadata: Mapping[str, Any],
    layers: Mapping[int, Rows] | None = None,
) -> None:
    """Write named embeddings; an earlier file is replaced only when the new one is complete.

    - .safetensors: "embeddings" [N, D]; ragged, "tokens" [sum m_i, D] and "offsets" [N+1] int64
      (layers: "layer_3", or "layer_3.tokens" and "layer_3.offsets"). Names are a JSON list under
      "names" in the header's metadata.
    - .npy: the matrix. Names and metadata are in FILE.json beside it.
    - .parquet: columns "name" and "embedding" (and "layer_3"), fixed-size lists of floats; ragged,
      lists of these. Metadata are in the schema.

    Args:
        path: Output, by its suffix.
        names: One for each item.
        embeddings: fp32 [N, D], or a list of [m_i, D].
        metadata: Plain values; stored as JSON unless they are strings.
        layers: More of the same kind, by block index.

    Raises:
        ValueError: as `check_output`, or the number of names is not that of embeddings.
        ImportError: pyarrow is missing.
    """
    path = Path(path)
    columns = {"embedding": embeddings} | {f"layer_{i}": rows for i, rows in (layers or {}).items()}
    ragged = not isinstance(embeddings, np.ndarray)
    check_output(path, ragged=ragged, layers=bool(layers))
    for column, rows in columns.items():
        if len(rows) != len(names):
            raise ValueError(
                f"write_embeddings: {len(names)} names for {len(rows)} rows of {column!r}"
            )
    plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    if path.suffix == ".safetensors":
        _write_safetensors(path, list(names), columns, plain)
    elif path.suffix == ".npy":
        sidecar = json.dumps({"names": list(names), "metadata": plain}, indent=1)
        _replace(Path(f"{path}.json"), lambda temporary: temporary.write_text(sidecar))
        _replace(path, lambda temporary: _save_npy(temporary, columns["embedding"]))
    else:
        _write_parquet(path, list(names), columns, plain)


def run_metadata(
    *,
    model: str,
    revision: str | None,
    dtype: str,
    pooling: str,
    normalized: bool,
    layers: Sequence[int] = (),
    pruning_rate: float | None = None,
    precision: str = "native",
) -> dict[str, Any]:
    """What a reader of an output needs to make it again, versions included."""
    return {
        "model": model,
        "revision": revision,
        "dtype": dtype,
        "precision": precision,
        "pooling": pooling,
        "normalized": normalized,
        "layers": list(layers),
        "pruning_rate": pruning_rate,
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str | None]:
    """Versions of what computes embeddings; None for what is not installed."""
    versions: dict[str, str | None] = {}
    for name in ("vitgraph", "torch", "transformers", "triton"):
        try:
            versions[name] = packages.version(name)
        except packages.PackageNotFoundError:
            versions[name] = None
    return versions


def _write_safetensors(
    path: Path, names: list[str], columns: Mapping[str, Rows], metadata: dict[str, str]
) -> None:
    from safetensors.numpy import save_file

    header = {**metadata, "names": json.dumps(names)}
    if sum(len(value) for value in header.values()) > MAX_HEADER_BYTES:
        raise ValueError(
            f"write_embeddings: the names of {len(names)} items do not fit the header of "
            f"{path}; use .parquet"
        )
    tensors = {}
    for column, rows in columns.items():
        main = column == "embedding"
        if isinstance(rows, np.ndarray):
            tensors["embeddings" if main else column] = np.ascontiguousarray(rows)
        else:
            flat, offsets = _concatenate(rows)
            tensors["tokens" if main else f"{column}.tokens"] = flat
            tensors["offsets" if main else f"{column}.offsets"] = offsets
    _replace(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def _write_parquet(
    path: Path, names: list[str], columns: Mapping[str, Rows], metadata: dict[str, str]
) -> None:
    pa, parquet = _pyarrow()
    arrays = {"name": pa.array(names, pa.string())}
    for column, rows in columns.items():
        offsets = None
        if not isinstance(rows, np.ndarray):
            rows, offsets = _concatenate(rows)
        width = rows.shape[1]
        values = pa.array(np.ascontiguousarray(rows, dtype=np.float32).reshape(-1), pa.float32())
        array = pa.FixedSizeListArray.from_arrays(values, width)
        if offsets is not None:
            # 64-bit offsets, for more than 2^31 tokens together
            array = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), array)
        arrays[column] = array
    table = pa.table(arrays).replace_schema_metadata(metadata)
    _replace(path, lambda temporary: parquet.write_table(table, temporary))


def _concatenate(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """[sum m_i, D] and [N+1] int64 offsets."""
    offsets = np.cumsum([0, *(len(part) for part in rows)], dtype=np.int64)
    return np.concatenate(rows) if len(rows) else np.zeros((0, 1), np.float32), offsets


def _save_npy(path: Path, matrix: Rows) -> None:
    with path.open("wb") as file:  # np.save would add a suffix to the temporary name
        np.save(file, np.asarray(matrix), allow_pickle=False)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp makes files that only their owner reads
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "writing .parquet needs pyarrow: pip install 'vitgraph[parquet]'"
        ) from error
    return pyarrow, parquet
