"""The launch tables of matrix products that are in force on a GPU.

For a layer of M rows the first of these that has an entry of its shape decides:

1. what the user has measured on this GPU by `vitgraph tune`: tiles of few rows against all others,
   and those against the library (the file of tuning_cache.py);
2. the shipped tiles of few rows (few_rows_tuning.py), up to the last M of their entry;
3. the shipped table (gemm_tuning.py), else its rule between what was measured, else the library,
   by the algorithm that was measured to be its fastest (library_tuning.py), if one was.

Before all of them, the shipped tiles around a norm that takes no kernel (`DEFERRED` of
few_rows_tuning.py) decide for those two layers: what they save is the kernel, not the products.

The file is read once in a process, when a GPU is first asked for, so the choice cannot change under
a graph.
"""

import functools
import hashlib
import json
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import cublaslt, few_rows_tuning, gemm_tuning, library_tuning
from .few_rows_tuning import few_rows_from_json
from .gemm import hopper_reason
from .gemm_tuning import table_from_json, table_to_json
from .library_tuning import library_from_json
from .tuning_cache import read_tuning, tuning_path


@dataclass(eq=False)
class Tuning:
    """The tables that one GPU goes by, and the file of the user that they hold, if there is one.

    Attributes:
        table: As in gemm_tuning.py.
        few_rows: As in few_rows_tuning.py; asked first.
        deferred: As in few_rows_tuning.py; asked before that, for the products around a norm.
        library: As in library_tuning.py; asked last.
        path: The user's file.
    """

    table: gemm_tuning.Table
    few_rows: few_rows_tuning.Table
    deferred: few_rows_tuning.DeferredTable
    library: library_tuning.Table
    path: Path | None = None

    @functools.cached_property
    def digest(self) -> str:
        """Changes with `table`."""
        text = json.dumps(table_to_json(self.table), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def fingerprint(self) -> str:
        """Changes with each of the tables."""
        few_rows = few_rows_tuning.table_digest(self.few_rows)
        deferred = few_rows_tuning.table_digest(self.deferred)
        library = library_tuning.table_digest(self.library)
        return f"gemm={self.digest} few_rows={few_rows} deferred={deferred} library={library}"


_SHIPPED = Tuning(
    gemm_tuning.TABLE, few_rows_tuning.TABLE, few_rows_tuning.DEFERRED, library_tuning.TABLE
)
_ELSEWHERE = replace(_SHIPPED, library={})
_lock = threading.Lock()


def tuning(device: torch.device) -> Tuning:
    """The tables of `device`: its user's measurements, before those shipped.

    Raises:
        ValueError: the user's file is damaged; names it and the way out.
    """
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return _tuning_of_device(device)


def tuning_report(device: torch.device) -> str:
    """One line on the tables of `device`, or on why they cannot be used."""
    try:
        path = tuning(device).path
    except ValueError as error:
        return str(error)
    report = "shipped" if path is None else f"measured on this GPU: {path}"
    here = cublaslt.version()
    is_used = here is not None and hopper_reason(device, torch.bfloat16) is None
    if not is_used or here == library_tuning.VERSION:
        return report
    return (
        f"{report}; shipped algorithms of the library are of cuBLASLt {library_tuning.VERSION}, "
        f"here it is {here}: what it does not have of them is left to its own choice"
    )


def _is_major_release() -> bool:
    """Whether algorithms may be called here what they were called where they were measured."""
    here = cublaslt.version()
    return here is None or here.split(".")[0] == library_tuning.VERSION.split(".")[0]


@functools.cache
def _tuning_of_device(device: torch.device) -> Tuning:
    if device.type != "cuda" or not torch.cuda.is_available():
        return _SHIPPED
    # a GPU of the same name gets the same table even if the file has changed since, and of two
    # threads that ask at once the second gets what the first has read
    with _lock:
        return _tuning_of_gpu(torch.cuda.get_device_name(device))


@functools.cache
def _tuning_of_gpu(gpu: str) -> Tuning:
    path = tuning_path(gpu)
    try:
        content = read_tuning(gpu)
        shipped = _SHIPPED if _is_major_release() else _ELSEWHERE
        if content is None:
            return shipped
        table = table_from_json(content.get("gemm"))
        few_rows = few_rows_from_json(content.get("few_rows"))
        library = library_from_json(content.get("library"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(
            f"linear: {path}, the launch table measured on this GPU, cannot be used ({error}); "
            "delete it to go by the shipped table, or run `vitgraph tune` to measure again"
        ) from error
    # a measured shape without a tile of few rows was faster without one
    measured = {**dict.fromkeys(table, ()), **few_rows}
    return Tuning(
        {**gemm_tuning.TABLE, **table},
        {**few_rows_tuning.TABLE, **measured},
        shipped.deferred,
        {**shipped.library, **library},
        path,
    )
