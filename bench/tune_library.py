"""Algorithms of cuBLASLt as candidates for a launch.

Proposals for a product and for some of more or fewer rows are timed one by one; the fastest few go
into the contest of tune_contest.py, where they are checked.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from fractions import Fraction

from ..kernels import cublaslt
from ..kernels.cublaslt import Algorithm, Product
from .timing import Effort, record_each, time_graphs

LIBRARY = "library"  # its own choice, and how the names of its algorithms begin
MOST_ALGORITHMS = 4  # that are measured with care
_OTHER_ROWS = (Fraction(1), Fraction(1, 2), Fraction(3, 4), Fraction(3, 2), Fraction(2))
_QUICK_CALLS = 3
_QUICK = Effort(warmup_s=0.0, rounds=3, min_rounds=3)

# calls one after the other, each on operands of its own; False if the algorithm cannot
Calls = Sequence[Callable[[], bool]]


def algorithm_name(algorithm: Algorithm) -> str:
    """As rows and reports name it: what differs from the defaults of `Algorithm`."""
    usual = {f.name: f.default for f in fields(Algorithm)}
    parts = [f"{k}={v}" for k, v in asdict(algorithm).items() if v != usual[k]]
    return " ".join([LIBRARY, *parts])


def algorithm_literal(algorithm: Algorithm) -> str:
    """As kernels/library_tuning.py names it: its first fields by position, and what is unusual."""
    usual = {f.name: f.default for f in fields(Algorithm)}
    named = [f"{k}={v}" for k, v in asdict(algorithm).items() if v != usual[k]]
    parts = [str(algorithm.tile), str(algorithm.custom), str(algorithm.cluster), *named[3:]]
    return f"Algorithm({', '.join(parts)})"


def algorithm_of(name: str) -> Algorithm | None:
    """The algorithm of that name; None for the library's own choice and for other candidates."""
    first, *parts = name.split(" ")
    if first != LIBRARY or not parts:
        return None
    return Algorithm(**{key: int(value) for key, value in (part.split("=") for part in parts)})


def is_library(name: str) -> bool:
    """Whether a candidate is the library, by whatever algorithm."""
    return name.split(" ")[0] == LIBRARY


def fastest_of_library(us: Mapping[str, float]) -> float:
    """Microseconds of the library, by whatever algorithm."""
    return min(time for name, time in us.items() if is_library(name))


def proposed(product: Product) -> list[Algorithm]:
    """What cuBLASLt proposes for `product` and for more or fewer rows of it, once each."""
    rows = (max(1, int(product.M * part)) for part in _OTHER_ROWS)
    found = (a for M in rows for a in cublaslt.proposals(replace(product, M=M)))
    return list(dict.fromkeys(found))


def fastest(
    algorithms: Iterable[Algorithm], calls_of: Callable[[Algorithm], Calls]
) -> list[Algorithm]:
    """The `MOST_ALGORITHMS` quickest in a graph of a few calls, of those that can do them."""
    names: dict[str, Algorithm] = {}
    graphs = {}
    for algorithm in algorithms:
        first, *calls = calls_of(algorithm)[: 1 + _QUICK_CALLS]
        # a table of many goes on when one fails, and the others are measured
        with suppress(RuntimeError):
            if first():
                names[algorithm_name(algorithm)] = algorithm
                graphs[algorithm_name(algorithm)] = record_each(calls)
    times = time_graphs(graphs, _QUICK) if graphs else {}
    return [names[name] for name in sorted(times, key=lambda n: times[n].ms)][:MOST_ALGORITHMS]
