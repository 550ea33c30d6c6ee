"""Matrix products of cuBLASLt by an algorithm that we name.

    y = x @ weight.T (+ bias)           or y = gelu_tanh(x @ weight.T + bias),          or in place
    residual += x @ weight.T

x [M, K], weight [N, K], bias [N], y and residual [M, N], all fp16 or all bf16, elements of a row
adjacent; sums are fp32, and the GELU is that of `torch._addmm_activation`.

For a product cuBLASLt proposes several algorithms, and PyTorch runs its own choice, as a rule the
first. Which one is the fastest has to be measured: at 800 rows a later one is up to a fifth faster.
library_tuning.py holds what was measured. Everything else is PyTorch's (library_linear.py).

No algorithm is given a workspace, so calls on several streams share nothing. Some can use four
bytes for a queue of tiles; without them they deal the tiles out beforehand. The library is that of
PyTorch's CUDA release, which PyTorch has loaded.

https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api
"""

import ctypes
import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import (
    byref,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
    sizeof,
)
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

Epilogue = Literal["", "gelu_tanh", "residual"]

_DATA_TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType_t
_FLOAT, _COMPUTE_FLOAT = 0, 68  # cudaDataType_t, cublasComputeType_t
_TRANS_A, _TRANS_B, _EPILOGUE, _BIAS = 3, 4, 7, 8  # cublasLtMatmulDescAttributes_t
_PLAIN, _WITH_BIAS, _GELU_WITH_BIAS = 1, 4, 36  # cublasLtEpilogue_t
_MAX_WORKSPACE = 1  # cublasLtMatmulPreferenceAttributes_t
_NOT_SUPPORTED = 15  # cublasStatus_t
_MOST_PROPOSALS = 16
_SPARED_WORKSPACE = 4  # bytes that an algorithm can do without
_ALIGNMENT = 256  # of operands, which cuBLASLt takes for granted


@dataclass(frozen=True)
class Algorithm:
    """An algorithm by its attributes, in the order of `cublasLtMatmulAlgoConfigAttributes_t`.

    The defaults are those of nearly everything that is proposed on compute capability 9.0.

    Attributes:
        tile, stages, inner, cluster: Ids of `cublasLtMatmulTile_t`, `cublasLtMatmulStages_t`,
            `cublasLtMatmulInnerShape_t` and `cublasLtClusterShape_t`.
        custom: A number that only the algorithm knows.
        kind: The id of the algorithm itself.
        splits, reduction: Parts of K and how they are added up.
        swizzle: Whether tiles are taken in another order.
    """

    tile: int
    custom: int
    cluster: int
    kind: int = 66
    splits: int = 1
    reduction: int = 0
    swizzle: int = 0
    stages: int = 35
    inner: int = 0


# cublasLtMatmulAlgoConfigAttributes_t and the types of their values
_ATTRIBUTES: dict[str, tuple[int, Any]] = {
    "kind": (0, c_int32),
    "tile": (1, c_uint32),
    "splits": (2, c_int32),
    "reduction": (3, c_uint32),
    "swizzle": (4, c_uint32),
    "custom": (5, c_uint32),
    "stages": (6, c_uint32),
    "inner": (7, c_uint16),
    "cluster": (8, c_uint16),
}
_ONE, _ZERO = c_float(1.0), c_float(0.0)


class _Found(ctypes.Structure):  # cublasLtMatmulHeuristicResult_t
    _fields_ = (
        ("words", c_uint64 * 8),  # cublasLtMatmulAlgo_t
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@dataclass(frozen=True)
class Product:
    """All that an algorithm depends on.

    Attributes:
        M, N, K: Rows of x, rows of the weight, and what is summed over.
        strides: Elements between rows of x, of the weight and of y.
        dtype: Of all operands, fp16 or bf16.
        epilogue: What follows the product.
        has_bias: Always with a GELU, never with a residual.
        device: Index of the GPU.
    """

    M: int
    N: int
    K: int
    strides: tuple[int, int, int]
    dtype: torch.dtype
    epilogue: Epilogue
    has_bias: bool
    device: int


def product_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    epilogue: Epilogue,
) -> Product | None:
    """The product of these operands; None if there is none, or no algorithm may take them.

    Proposals suppose that every operand starts at a multiple of 256 bytes.
    """
    if x.dtype not in _DATA_TYPES or x.device.index is None:
        return None
    for m in (x, weight, y):  # rows apart from each other, elements side by side
        if m.stride(1) != 1 or m.stride(0) % 8 or m.stride(0) < m.shape[1]:
            return None
    given = [m for m in (x, weight, bias, y) if m is not None]
    (M, K), N = x.shape, weight.shape[0]
    if M * N * K == 0 or any(m.data_ptr() % _ALIGNMENT for m in given):
        return None
    strides = (x.stride(0), weight.stride(0), y.stride(0))
    return Product(M, N, K, strides, x.dtype, epilogue, bias is not None, x.device.index)


def version() -> str | None:
    """The release of cuBLASLt that PyTorch has loaded; None without one."""
    library = _library()
    if library is None:
        return None
    number = library.cublasLtGetVersion()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def proposals(product: Product) -> list[Algorithm]:
    """What cuBLASLt proposes, its favourite first; empty without the library."""
    if _library() is None:
        return []
    found, count = (_Found * _MOST_PROPOSALS)(), c_int(0)
    matrices = _Matrices(product)
    with _preference() as preference, _description(product, None) as description:
        status = _library().cublasLtMatmulAlgoGetHeuristic(
            _handle(product.device), description, *matrices.abcd, preference,
            c_int(_MOST_PROPOSALS), found, byref(count),
        )  # fmt: skip
    if status == _NOT_SUPPORTED:
        return []
    _check("cublasLtMatmulAlgoGetHeuristic", status)
    return [_described(each.words) for each in found[: count.value] if each.state == 0]


def multiply(
    product: Product,
    algorithm: Algorithm,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
) -> bool:
    """Compute `product` into y on the current stream; False if `algorithm` cannot.

    Whether it can depends on `product` and the release of the library alone.

    Raises:
        RuntimeError: cuBLASLt reports an error.
    """
    plan = _plan(product, algorithm)
    if plan is None:
        return False
    words, matrices = plan
    A, B, C, D = matrices.abcd
    of_weight, of_x, of_y = (c_void_p(m.data_ptr()) for m in (weight, x, y))
    scale = _ONE if product.epilogue == "residual" else _ZERO
    with torch.cuda.device(product.device), _description(product, bias) as description:
        _call(
            "cublasLtMatmul",
            _handle(product.device), description, byref(_ONE), of_weight, A, of_x, B,
            byref(scale), of_y, C, of_y, D, words, None, c_size_t(0),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
    return True


class _Matrices:
    """Weight, x and y as cuBLASLt describes them, as long as this object lives.

    It works by columns, and a row of ours is a column of its: y.T = weight @ x.T.
    """

    def __init__(self, product: Product):
        of_x, of_weight, of_y = product.strides
        data_type, (M, N, K) = _DATA_TYPES[product.dtype], (product.M, product.N, product.K)
        weight, x, y = (
            self._layout(data_type, *size)
            for size in ((K, N, of_weight), (K, M, of_x), (N, M, of_y))
        )
        self.abcd = (weight, x, y, y)

    def _layout(self, data_type: int, rows: int, columns: int, stride: int) -> c_void_p:
        layout = c_void_p()
        size = c_uint64(rows), c_uint64(columns), c_int64(stride)
        _call("cublasLtMatrixLayoutCreate", byref(layout), c_int(data_type), *size)
        weakref.finalize(self, _library().cublasLtMatrixLayoutDestroy, layout).atexit = False
        return layout


@functools.lru_cache(maxsize=4096)
def _plan(product: Product, algorithm: Algorithm) -> tuple[Any, _Matrices] | None:
    """How `algorithm` computes `product`; None if this release of the library does not."""
    library = _library()
    if library is None:
        return None
    words, data_type = (c_uint64 * 8)(), c_int(_DATA_TYPES[product.dtype])
    handle = _handle(product.device)
    wrong = library.cublasLtMatmulAlgoInit(
        handle, c_int(_COMPUTE_FLOAT), c_int(_FLOAT), *[data_type] * 4,
        c_int(algorithm.kind), words,
    )  # fmt: skip
    for name, setting in asdict(algorithm).items():
        number, value_type = _ATTRIBUTES[name]
        value = value_type(setting)
        if name != "kind":
            wrong = wrong or library.cublasLtMatmulAlgoConfigSetAttribute(
                words, c_int(number), byref(value), c_size_t(sizeof(value))
            )
    matrices, found = _Matrices(product), _Found()
    with _description(product, None) as description:
        wrong = wrong or library.cublasLtMatmulAlgoCheck(
            handle, description, *matrices.abcd, words, byref(found)
        )
    return None if wrong or found.workspace > _SPARED_WORKSPACE else (words, matrices)


def _described(words: Any) -> Algorithm:
    """The algorithm that cuBLASLt keeps in `words`."""
    settings = {}
    for name, (number, value_type) in _ATTRIBUTES.items():
        value, written = value_type(0), c_size_t(0)
        _call(
            "cublasLtMatmulAlgoConfigGetAttribute",
            words, c_int(number), byref(value), c_size_t(sizeof(value)), byref(written),
        )  # fmt: skip
        settings[name] = value.value
    return Algorithm(**settings)


@contextmanager
def _description(product: Product, bias: torch.Tensor | None) -> Iterator[c_void_p]:
    """A `cublasLtMatmulDesc_t`; `bias` may be None for what reads none of its values."""
    epilogue = _GELU_WITH_BIAS if product.epilogue == "gelu_tanh" else _PLAIN
    if product.has_bias and epilogue == _PLAIN:
        epilogue = _WITH_BIAS
    attributes = [(_TRANS_A, c_int32(1)), (_TRANS_B, c_int32(0)), (_EPILOGUE, c_uint32(epilogue))]
    if product.has_bias:
        address = _ALIGNMENT if bias is None else bias.data_ptr()  # 0 would stand for no bias
        attributes.append((_BIAS, c_void_p(address)))
    description = c_void_p()
    _call("cublasLtMatmulDescCreate", byref(description), c_int(_COMPUTE_FLOAT), c_int(_FLOAT))
    try:
        for number, value in attributes:
            _call(
                "cublasLtMatmulDescSetAttribute",
                description, c_int(number), byref(value), c_size_t(sizeof(value)),
            )  # fmt: skip
        yield description
    finally:
        _call("cublasLtMatmulDescDestroy", description)


@contextmanager
def _preference() -> Iterator[c_void_p]:
    """A `cublasLtMatmulPreference_t` without workspace."""
    preference, none = c_void_p(), c_uint64(0)
    _call("cublasLtMatmulPreferenceCreate", byref(preference))
    try:
        _call(
            "cublasLtMatmulPreferenceSetAttribute",
            preference, c_int(_MAX_WORKSPACE), byref(none), c_size_t(sizeof(none)),
        )  # fmt: skip
        yield preference
    finally:
        _call("cublasLtMatmulPreferenceDestroy", preference)


@functools.cache
def _library() -> Any:
    """cuBLASLt as PyTorch has loaded it, None where there is none."""
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    except OSError:
        return None
    library.cublasLtGetVersion.restype = c_size_t
    return library


@functools.cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        _call("cublasLtCreate", byref(handle))
    return handle


def _call(name: str, *arguments: Any) -> None:
    _check(name, getattr(_library(), name)(*arguments))


def _check(name: str, status: int) -> None:
    if status:
        raise RuntimeError(f"linear: {name} of cuBLASLt {version()} failed with status {status}")
