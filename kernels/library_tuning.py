"""Which algorithm of cuBLASLt a product of the library takes, as measured.

What cuBLASLt chooses itself is often not its fastest algorithm. Each entry names the fastest of its
proposals for these or for some more or fewer rows, in bf16, up to a number of rows; a range goes on
while its algorithm is within 1 per cent of the fastest.

One NVIDIA H200, cuBLASLt 13.1.0, PyTorch 2.11.0 with CUDA 13.0, 2026-11-22, at 32 numbers of rows
from 288 to 20480 (a quarter of these on merged patches), as far up as gemm_tuning.py leaves them to
the library: in 289 of 544 measurements more than 3 per cent faster than its own choice, at most 29.
(Our tiles and these algorithms were timed in two runs, each beside the library's own choice.) At
384, 512, 640, 768, 832, 1024, 1280 and 1536 rows the algorithms of Qwen3-VL-8B, Qwen2-VL and
Qwen2.5-VL, from 512 to 1280 those of Qwen3-VL-2B, and at 832 those of GLM and Qwen3.5-0.8B are
those with which the captured tower as a whole was fastest, if by 0.4 per cent. In
another release of the same major version an entry holds where its algorithm runs; in all others the
library chooses itself.

`python -m vitgraph.bench tune --print` measures and prints the literal. What a user has measured by
`vitgraph tune` stands before it (tables.py).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from .cublaslt import Algorithm, Epilogue
from .gemm_tuning import RESIDUAL, of_class, read_table

# (N, K, what the library does after the product): (last M, algorithm), each from the one before on.
# None, and rows past the last entry, are the library's own choice.
Table = Mapping[tuple[int, int, str], tuple[tuple[int, Algorithm | None], ...]]

VERSION = "13.1.0"  # of cuBLASLt, that it was measured with

TABLE: Table = {
    # Qwen3-VL 8B and 32B, Qwen3.5, SigLIP 2 so400m, ...: qkv, proj, up, down
    (3456, 1152, ""): (
        (288, None), (352, Algorithm(319, 3, 7)), (1280, None), (1536, Algorithm(201, 6, 7)),
        (1664, Algorithm(20, 1, 3)), (1792, Algorithm(20, 3, 5)), (2048, Algorithm(165, 2, 5)),
        (2304, Algorithm(28, 0, 3)), (3072, Algorithm(165, 2, 5)), (14336, Algorithm(20, 3, 5)),
    ),
    (1152, 1152, RESIDUAL): (
        (288, None), (352, Algorithm(318, 1, 3)), (704, None), (768, Algorithm(17, 2, 7)),
        (832, Algorithm(15, 1, 3)), (1152, None), (1280, Algorithm(27, 2, 7)),
        (1536, Algorithm(17, 2, 7)), (1664, Algorithm(18, 3, 5)), (2304, None),
        (2560, Algorithm(208, 3, 9)), (3072, Algorithm(21, 3, 8)), (3584, Algorithm(28, 2, 5)),
        (4096, Algorithm(208, 3, 5)), (4608, None), (5120, Algorithm(208, 3, 5)),
        (6144, Algorithm(165, 2, 5)), (6656, Algorithm(29, 3, 5)), (7168, Algorithm(20, 3, 5)),
        (8192, Algorithm(184, 2, 5)), (9216, Algorithm(20, 3, 5)), (20480, Algorithm(184, 2, 5)),
    ),
    (4304, 1152, "gelu_tanh"): (
        (352, None), (416, Algorithm(184, 6, 9)), (576, None), (640, Algorithm(201, 4, 3)),
        (768, None), (832, Algorithm(24, 5, 3)), (1152, None), (1280, Algorithm(165, 2, 5)),
        (1408, None), (1536, Algorithm(165, 0, 3)), (1664, None), (1792, Algorithm(20, 1, 3)),
        (2048, Algorithm(31, 7, 5)), (2304, Algorithm(20, 1, 3)), (2560, Algorithm(165, 2, 5)),
        (3072, Algorithm(20, 1, 3)), (3584, Algorithm(495, 7, 5)), (4096, Algorithm(29, 5, 3)),
        (4608, Algorithm(20, 1, 3)),
    ),
    (1152, 4304, RESIDUAL): (
        (256, None), (288, Algorithm(318, 3, 7)), (352, None), (384, Algorithm(124, 2, 7)),
        (416, Algorithm(27, 2, 9)), (480, None), (512, Algorithm(143, 2, 9)), (768, None),
        (832, Algorithm(183, 2, 7)), (960, Algorithm(208, 3, 9)), (1024, Algorithm(196, 2, 8)),
        (1280, None), (1536, Algorithm(20, 3, 5)), (1664, Algorithm(458, 3, 9)), (2304, None),
        (2560, Algorithm(28, 2, 7)), (3072, Algorithm(20, 3, 8)), (3584, Algorithm(20, 3, 5)),
        (4096, Algorithm(184, 2, 5)), (4608, Algorithm(29, 3, 2)), (5120, Algorithm(20, 3, 5)),
        (6144, Algorithm(184, 2, 5)), (6656, Algorithm(29, 3, 5)), (7168, Algorithm(197, 2, 5)),
        (8192, Algorithm(184, 2, 5)), (9216, Algorithm(29, 3, 2)), (16384, Algorithm(184, 2, 5)),
        (20480, Algorithm(29, 3, 5)),
    ),
    # mergers of Qwen3-VL 8B
    (4608, 4608, ""): (
        (88, None), (104, Algorithm(134, 2, 7)), (128, None), (160, Algorithm(400, 1, 4)),
        (192, Algorithm(183, 0, 4)), (208, Algorithm(196, 2, 9)), (512, None),
        (576, Algorithm(31, 5, 3)), (640, Algorithm(495, 5, 3)), (768, Algorithm(165, 0, 3)),
        (896, Algorithm(20, 1, 3)), (1024, Algorithm(28, 0, 3)), (1152, Algorithm(135, 0, 3)),
        (1280, Algorithm(20, 1, 3)), (1536, Algorithm(184, 6, 5)), (1664, Algorithm(28, 0, 3)),
        (1792, Algorithm(20, 1, 3)), (2048, Algorithm(28, 0, 3)), (2304, Algorithm(20, 1, 3)),
        (2560, Algorithm(184, 6, 5)), (3072, Algorithm(28, 0, 3)), (3584, Algorithm(20, 1, 3)),
    ),
    (4096, 4608, ""): (
        (384, None), (416, Algorithm(403, 3, 5)), (448, None), (512, Algorithm(21, 3, 5)),
        (576, Algorithm(324, 1, 3)), (768, None), (896, Algorithm(135, 0, 3)), (1280, None),
        (1536, Algorithm(20, 1, 3)), (1792, Algorithm(165, 2, 2)), (2048, Algorithm(24, 7, 5)),
        (2304, Algorithm(495, 7, 5)), (2560, None), (3584, Algorithm(20, 1, 3)),
    ),
    # Qwen2.5-VL and Qwen2-VL: qkv, proj
    (3840, 1280, ""): (
        (768, None), (832, Algorithm(331, 3, 7)), (1024, Algorithm(20, 1, 3)),
        (1152, Algorithm(209, 4, 3)), (1280, Algorithm(165, 2, 5)), (1536, Algorithm(20, 1, 3)),
        (1664, Algorithm(28, 0, 3)), (1792, Algorithm(165, 2, 5)), (2048, Algorithm(20, 1, 3)),
        (2304, Algorithm(165, 2, 5)), (3584, Algorithm(20, 1, 3)), (4096, Algorithm(28, 0, 3)),
        (5120, Algorithm(165, 2, 5)), (6144, Algorithm(20, 1, 3)),
    ),
    (1280, 1280, RESIDUAL): (
        (704, None), (768, Algorithm(18, 3, 9)), (960, None), (1024, Algorithm(135, 0, 3)),
        (1152, None), (1280, Algorithm(165, 2, 7)), (1792, None), (2048, Algorithm(193, 2, 5)),
        (2304, Algorithm(116, 2, 7)), (2560, None), (3072, Algorithm(20, 3, 9)), (3584, None),
        (4096, Algorithm(135, 0, 3)), (4608, Algorithm(28, 0, 3)), (5120, Algorithm(400, 3, 5)),
        (6144, Algorithm(20, 1, 3)), (6656, Algorithm(21, 3, 5)), (7168, Algorithm(184, 2, 5)),
        (8192, Algorithm(20, 1, 3)), (9216, Algorithm(184, 2, 5)), (10240, Algorithm(400, 3, 5)),
        (12288, Algorithm(184, 2, 5)), (20480, Algorithm(29, 1, 3)),
    ),
    # Qwen2.5-VL: down
    (1280, 3456, RESIDUAL): (
        (352, None), (416, Algorithm(318, 3, 7)), (512, None), (640, Algorithm(164, 2, 7)),
        (768, None), (832, Algorithm(400, 3, 9)), (960, None), (1024, Algorithm(135, 0, 3)),
        (1152, Algorithm(116, 2, 7)), (1792, None), (2048, Algorithm(400, 3, 5)),
        (2304, Algorithm(33, 3, 9)), (2560, Algorithm(165, 2, 7)), (3072, Algorithm(20, 1, 3)),
        (3584, Algorithm(184, 2, 5)), (4096, Algorithm(400, 3, 5)), (4608, Algorithm(20, 1, 3)),
        (5120, Algorithm(400, 3, 5)), (6144, Algorithm(29, 1, 3)), (6656, Algorithm(20, 1, 3)),
        (7168, Algorithm(184, 2, 5)), (8192, Algorithm(20, 1, 3)), (9216, Algorithm(165, 0, 3)),
        (12288, Algorithm(29, 1, 3)), (16384, Algorithm(20, 1, 3)), (18432, Algorithm(29, 3, 5)),
        (20480, Algorithm(184, 2, 5)),
    ),
    # Qwen2-VL: down
    (1280, 5120, RESIDUAL): (
        (352, None), (416, Algorithm(320, 3, 7)), (576, None), (640, Algorithm(164, 2, 7)),
        (768, None), (832, Algorithm(135, 0, 4)), (2304, None), (2560, Algorithm(220, 2, 9)),
        (3072, Algorithm(20, 1, 3)), (3584, Algorithm(184, 2, 5)), (4096, Algorithm(29, 1, 3)),
        (4608, Algorithm(20, 1, 3)), (5120, Algorithm(400, 3, 5)), (6144, Algorithm(29, 1, 3)),
        (6656, Algorithm(20, 1, 3)), (7168, Algorithm(184, 2, 5)),
    ),
    # mergers of Qwen2.5-VL and Qwen2-VL
    (5120, 5120, ""): (
        (128, None), (160, Algorithm(326, 1, 4)), (192, None), (256, Algorithm(28, 2, 7)),
        (288, None), (320, Algorithm(20, 1, 4)), (448, None), (512, Algorithm(247, 6, 5)),
        (576, Algorithm(33, 1, 4)), (640, Algorithm(165, 0, 3)), (768, Algorithm(20, 1, 3)),
        (896, Algorithm(28, 0, 3)), (1024, Algorithm(135, 0, 3)), (1152, Algorithm(20, 1, 3)),
        (1280, Algorithm(400, 3, 5)), (1536, Algorithm(28, 0, 3)), (1664, Algorithm(20, 1, 3)),
        (1792, Algorithm(165, 0, 3)), (2048, Algorithm(20, 1, 3)), (2304, Algorithm(184, 6, 5)),
        (2560, Algorithm(165, 0, 3)),
    ),
    (3584, 5120, ""): (
        (160, None), (192, Algorithm(18, 3, 9)), (208, None), (256, Algorithm(18, 3, 5)),
        (288, None), (320, Algorithm(400, 3, 5)), (512, None), (576, Algorithm(324, 3, 7)),
        (640, None), (768, Algorithm(32, 4, 3)), (896, Algorithm(334, 3, 7)), (1024, None),
        (1152, Algorithm(20, 1, 3)), (1280, Algorithm(184, 6, 5)), (1536, Algorithm(165, 0, 3)),
        (1664, Algorithm(20, 1, 3)), (1792, Algorithm(20, 3, 5)), (2048, Algorithm(165, 0, 3)),
        (2304, Algorithm(197, 6, 5)), (3072, Algorithm(165, 0, 3)), (3584, Algorithm(20, 3, 5)),
    ),
    # Qwen3-VL 2B and 4B, GLM-OCR, InternViT-300M: qkv, proj, up, down
    (3072, 1024, ""): (
        (256, None), (288, Algorithm(18, 1, 3)), (768, None), (832, Algorithm(400, 1, 3)),
        (1024, Algorithm(28, 0, 3)), (1152, None), (1280, Algorithm(24, 7, 5)),
        (2048, None), (3072, Algorithm(20, 1, 3)), (3584, Algorithm(165, 0, 3)),
        (20480, Algorithm(20, 1, 3)),
    ),
    (1024, 1024, RESIDUAL): (
        (256, None), (288, Algorithm(80, 0, 3)), (896, None), (1024, Algorithm(17, 0, 3)),
        (1152, Algorithm(318, 1, 3)),
        (1664, None), (1792, Algorithm(19, 0, 3)), (2048, None), (2304, Algorithm(400, 3, 5)),
        (3072, None), (3584, Algorithm(28, 2, 5)), (4096, Algorithm(21, 3, 5)), (5120, None),
        (7168, Algorithm(28, 2, 5)), (8192, Algorithm(201, 2, 5)), (9216, Algorithm(20, 3, 7)),
        (10240, Algorithm(20, 1, 3)), (14336, Algorithm(29, 1, 3)), (20480, Algorithm(20, 1, 3)),
    ),
    (4096, 1024, "gelu_tanh"): (
        (640, None), (768, Algorithm(33, 3, 5)), (832, Algorithm(331, 1, 3)),
        (896, Algorithm(165, 2, 2)), (1024, Algorithm(20, 1, 3)), (1536, None),
        (1792, Algorithm(165, 2, 2)), (2304, None), (2560, Algorithm(165, 0, 3)),
        (3072, Algorithm(28, 0, 3)), (3584, Algorithm(165, 2, 5)), (6656, Algorithm(20, 1, 3)),
        (8192, Algorithm(165, 2, 5)), (16384, Algorithm(20, 1, 3)),
    ),
    (1024, 4096, RESIDUAL): (
        (352, None), (416, Algorithm(143, 2, 9)), (512, None), (640, Algorithm(318, 1, 3)),
        (768, Algorithm(26, 1, 3)), (832, Algorithm(18, 3, 7)), (896, None),
        (1024, Algorithm(17, 0, 3)), (1152, Algorithm(28, 2, 7)), (2560, None),
        (3072, Algorithm(33, 3, 5)), (4096, Algorithm(20, 1, 3)), (4608, Algorithm(151, 2, 5)),
        (5120, None), (6144, Algorithm(21, 3, 5)), (7168, Algorithm(29, 1, 3)),
        (8192, Algorithm(20, 1, 3)), (9216, Algorithm(28, 2, 5)), (20480, Algorithm(20, 1, 3)),
    ),
    # GLM-5: gate and up, which a kernel of its own joins
    (8192, 1024, ""): ((768, None), (832, Algorithm(331, 1, 3))),
    # Qwen3.5-0.8B: up, down
    (3072, 768, "gelu_tanh"): ((768, None), (832, Algorithm(400, 1, 3))),
    (768, 3072, RESIDUAL): ((768, None), (832, Algorithm(27, 2, 7))),
    # GLM-4.1V: down
    (1536, 4096, RESIDUAL): (
        (448, None), (512, Algorithm(164, 2, 9)), (768, None), (832, Algorithm(33, 3, 7)),
    ),
}  # fmt: skip

EPILOGUES = get_args(Epilogue)


def library_algorithm(
    M: int, N: int, K: int, epilogue: str, table: Table = TABLE
) -> Algorithm | None:
    """The algorithm for M rows; None to leave it to the library."""
    return of_class(M, table.get((N, K, epilogue), ()))


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
