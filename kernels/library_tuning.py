"""Which algorithm of cuBLASLt a product of the library takes, as measured.

The first that cuBLASLt proposes, which is what PyTorch takes, is rarely its fastest. Each entry
names the fastest of its proposals in a range of rows. Where it does not run, in another release of
the library say, the library chooses itself.

`python -m vitgraph.bench tune --print` measures and prints the literal. What a user has measured by
`vitgraph tune` stands before it (tables.py).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from .cublaslt import Algorithm, Epilogue
from .gemm_tuning import read_table

# (N, K, what the library does after the product): (last M, algorithm), each from the one before on.
# None, and rows past the last entry, are the library's own choice.
Table = Mapping[tuple[int, int, str], tuple[tuple[int, Algorithm | None], ...]]

VERSION = "13.1.0"  # of cuBLASLt, that it was measured with

TABLE: Table = {}

EPILOGUES = get_args(Epilogue)


def library_algorithm(
    M: int, N: int, K: int, epilogue: str, table: Table = TABLE
) -> Algorithm | None:
    """The algorithm for M rows; None to leave it to the library."""
    for last, algorithm in table.get((N, K, epilogue), ()):
        if last >= M:
            return algorithm
    return None


def table_digest(table: Table = TABLE) -> str:
    """Changes with `table`."""
    return hashlib.sha256(repr(sorted(table.items())).encode()).hexdigest()[:16]


def library_from_json(entries: Any) -> Table:
    """The table of algorithms that `gemm_tuning.table_to_json` wrote.

    Raises:
        ValueError: an entry is not of that form, or an algorithm does not have the attributes of
            `Algorithm`, each a number of at least 0.
    """
    return read_table(entries, _read_algorithm, "last M", EPILOGUES)


def _read_algorithm(content: Any, epilogue: str, K: int) -> Algorithm:
    names = [field.name for field in fields(Algorithm)]
    if not isinstance(content, dict) or set(content) != set(names):
        raise ValueError(f"algorithm {content!r} does not have {', '.join(names)}")
    for name, value in content.items():
        if type(value) is not int or value < 0:  # bool is a subclass of int
            raise ValueError(f"{name} = {value!r} of an algorithm must be a number of at least 0")
    return Algorithm(**content)
