"""Bidirectional attention over packed segments: definition, and the choice of who computes it.

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]      over the rows j of i's own segment

q, k, v are [T, H, D] views of a fused [T, 3, H, D] buffer, out is [T, H, D], contiguous;
cu_seqlens is int32 [S + 1], its tail repeating the last offset, so that one buffer and one captured
graph serve every layout. Segments may be empty. Rows from `cu_seqlens[-1]` on belong to no segment
and are left as they are in `out`.

| backend   | computed by                                    | stale rows may be NaN |
|-----------|------------------------------------------------|-----------------------|
| reference | `attention_ref` (any device, syncs, no capture) | yes                   |
| triton    | `attention_triton`                             | yes                   |
| hopper    | `attention_hopper` (compute capability 9.0)    | yes                   |
| torch     | the FlashAttention-2 inside torch              | yes                   |
| fa2       | package flash-attn                             | yes                   |
| fa3       | package flash_attn_interface (Hopper)          | no                    |
| fa4       | `attention_fa4`                                | no                    |

`out` has the dtype of q, or with `FP8_BACKENDS` float8_e4m3fn, without a scale: the kernels cast
their fp32 sums, to the nearest, and saturate at 448.

A backend is imported when it is first used.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from .dispatch import is_interpreting
from .launch import is_compiling
from .quantize import FP8, FP8_MAX
from .roofline import Cost

BACKENDS = ("reference", "triton", "hopper", "torch", "fa2", "fa3", "fa4")
FP8_BACKENDS = ("reference", "triton", "hopper")  # those that can write fp8
_HALF = (torch.float16, torch.bfloat16)


def attention_ref(q, k, v, cu_seqlens, *, scale: float, out=None) -> torch.Tensor:
    """Plain PyTorch definition, in the dtype of its inputs (pass fp64 for the oracle).

    Reads `cu_seqlens` on the host. A fresh output is zero outside the segments.
    """
    if out is None:
        out = q.new_zeros(q.shape)
    offsets = cu_seqlens.tolist()
    for begin, end in pairwise(offsets):
        if end > begin:
            qkv = [x[begin:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
            o = F.scaled_dot_product_attention(*qkv, scale=scale)
            if out.dtype == FP8:
                o = o.clamp(-FP8_MAX, FP8_MAX)  # not every release of PyTorch saturates
            out[begin:end] = o.squeeze(0).transpose(0, 1)
    return out


def cost(lengths: Sequence[int], H: int, D: int, dtype: torch.dtype) -> Cost:
    """Least work and traffic: two products a score, each of q, k, v, out moved once."""
    scores = sum(n * n for n in lengths)
    return Cost(flops=4 * H * D * scores, bytes=4 * sum(lengths) * H * D * dtype.itemsize)


def check_tensors(
    name: str, q, k, v, cu_seqlens, scale: float, out, *, writes_fp8: bool = True
) -> None:
    """Refuse operands that no backend takes, and fp8 `out` unless `writes_fp8`.

    Raises:
        ValueError: a shape, stride, device, head dim or scale is not as the module says.
        TypeError: dtypes disagree, or the offsets are not int32.
    """
    if q.dim() != 3 or k.shape != q.shape or v.shape != q.shape or out.shape != q.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, out))
        raise ValueError(f"{name}: q, k, v, out must share one shape [T, H, D]; got {shapes}")
    if q.shape[-1] % 8 or q.shape[-1] == 0:
        raise ValueError(f"{name}: head dim {q.shape[-1]} is not a positive multiple of 8")
    out_dtypes = (q.dtype, FP8) if writes_fp8 else (q.dtype,)
    if not q.dtype == k.dtype == v.dtype or out.dtype not in out_dtypes:
        dtypes = ", ".join(str(x.dtype) for x in (q, k, v, out))
        exception = f", but out may be {FP8}" if writes_fp8 else ""
        raise TypeError(f"{name}: q, k, v, out must share one dtype{exception}; got {dtypes}")
    if out.dtype == FP8 and out.is_cuda and (reason := _capability_reason(out.device, (8, 9))):
        raise ValueError(f"{name}: out in {FP8} {reason}; use the dtype of q")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name}: cu_seqlens must be int32, not {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or not cu_seqlens.is_contiguous():
        raise ValueError(
            f"{name}: cu_seqlens must be contiguous [S + 1]; got {tuple(cu_seqlens.shape)} "
            f"with strides {cu_seqlens.stride()}"
        )
    if not q.device == k.device == v.device == out.device == cu_seqlens.device:
        devices = ", ".join(str(x.device) for x in (q, k, v, out, cu_seqlens))
        raise ValueError(
            f"{name}: q, k, v, out, cu_seqlens must be on one device; they are on {devices}"
        )
    for label, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1:
            raise ValueError(
                f"{name}: the last axis of {label} must be contiguous; strides are {x.stride()}"
            )
    if not out.is_contiguous():
        raise ValueError(f"{name}: out must be contiguous; strides are {out.stride()}")
    if not scale > 0:
        raise ValueError(f"{name}: scale must be positive, not {scale}")


def check_tickets(name: str, q: torch.Tensor, tickets: torch.Tensor | None) -> None:
    """Raise ValueError unless `tickets` are None or int32 [2] on the device of `q`."""
    if tickets is None:
        return
    if tickets.shape != (2,) or tickets.dtype != torch.int32 or tickets.device != q.device:
        raise ValueError(
            f"{name}: tickets must be int32 [2] on {q.device}, got {tickets.dtype} "
            f"{list(tickets.shape)} on {tickets.device}"
        )


def _package_reason(name: str, file: str | None, way_out: str) -> str | None:
    """Why a package cannot be used, None if it can: `file` is a module that it must hold.

    flash-attn-4 installs into the folder of flash-attn 2, so the name alone does not tell them
    apart. Nothing is imported.
    """
    spec = importlib.util.find_spec(name)
    if spec is not None:
        folders = spec.submodule_search_locations or ()
        if file is None or any((Path(f) / file).is_file() for f in folders):
            return None
    return f"{name} is not installed: {way_out}"


def _capability_reason(device: torch.device, least: tuple[int, int]) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= least:
        return None
    return (
        f"needs compute capability {least[0]}.{least[1]}, this is {capability[0]}.{capability[1]}"
    )


def _dims_reason(
    head_dim: int | None, most: int, dtype: torch.dtype | None, dtypes: Sequence[torch.dtype]
) -> str | None:
    if dtype is not None and dtype not in dtypes:
        return f"needs {' or '.join(map(str, dtypes))}, not {dtype}"
    if head_dim is not None and (head_dim % 8 or not 8 <= head_dim <= most):
        return f"needs a head dim that is a multiple of 8 up to {most}, not {head_dim}"
    return None


@lru_cache(maxsize=256)
def _reason(
    backend: str, device: torch.device, head_dim: int | None, dtype: torch.dtype | None
) -> str | None:
    """Why `backend` cannot run there, None if it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        # imported here: it builds on this module
        from .attention_triton import DTYPES, MAX_HEAD_DIM

        if device.type != "cuda" and not is_interpreting():
            return f"needs a CUDA device or TRITON_INTERPRET=1, this is {device.type}"
        return _dims_reason(head_dim, MAX_HEAD_DIM, dtype, DTYPES)
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if backend == "hopper":
        from . import attention_hopper

        return attention_hopper.unusable_reason(device, head_dim, dtype)
    if backend == "fa4":
        from . import attention_fa4

        return attention_fa4.unusable_reason(device, head_dim, dtype)
    if backend == "torch":
        missing = _package_reason("torch.nn.attention.varlen", None, "pip install 'torch>=2.11'")
        least = (8, 0)
    elif backend == "fa2":
        missing = _package_reason(
            "flash_attn", "flash_attn_interface.py", "pip install 'vitgraph[flash]'"
        )
        least = (8, 0)
    else:
        missing = _package_reason(
            "flash_attn_interface", None, "build it from the hopper folder of flash-attention"
        )
        least = (9, 0)
    return missing or _capability_reason(device, least) or _dims_reason(head_dim, 256, dtype, _HALF)


def _with_index(device: torch.device | str | None) -> torch.device:
    """A device that does not change meaning when the current device does, as a cache key must."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return where


def backend_report(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Every backend, with None if it can be used on `device`, else one line on why not.

    `device` defaults to the current CUDA device, or the CPU where there is none.
    """
    where = _with_index(device)
    return {name: _reason(name, where, None, None) for name in BACKENDS}


def check_backend(name: str, dtype: torch.dtype, device: torch.device | str, head_dim: int) -> None:
    """Refuse a backend that cannot compute this.

    Raises:
        ValueError: `name` is unknown, or cannot be used here; says why, and which ones can.
    """
    where = _with_index(device)
    if name not in BACKENDS:
        raise ValueError(f"attention: unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    if reason := _reason(name, where, head_dim, dtype):
        usable = [b for b in BACKENDS if _reason(b, where, head_dim, dtype) is None]
        raise ValueError(
            f"attention: backend {name!r} {reason}; usable for {dtype} and head dim {head_dim} "
            f"on {where}: {', '.join(usable)}"
        )


def choose_backend(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """Backend for q, k and v of this kind when the user names none.

    reference on a CPU. For 16-bit dtypes hopper, else fa4, whichever is usable. Else triton.

    Measured on an H200 with 16 heads of 64, 72, 80 and 128, hopper takes 0.6 to 1.1 of fa4's
    time, whatever the segments.

    Raises:
        ValueError: none of these takes the dtype or head dim; the message names those that do.
    """
    where = _with_index(device)
    if where.type != "cuda":
        return "reference"
    if dtype in _HALF:
        for name in ("hopper", "fa4"):
            if _reason(name, where, head_dim, dtype) is None:
                return name
    check_backend("triton", dtype, where, head_dim)
    return "triton"


def _copy_live(result: torch.Tensor, cu_seqlens: torch.Tensor, out: torch.Tensor) -> None:
    """Copy the rows of the segments; the others are uninitialised in `result`. Can be captured."""
    live = torch.arange(out.shape[0], device=out.device) < cu_seqlens[-1]
    torch.where(live[:, None, None], result, out, out=out)


def _reference(q, k, v, cu_seqlens, *, max_seqlen: int, scale: float, out) -> None:
    attention_ref(q, k, v, cu_seqlens, scale=scale, out=out)


def _torch(q, k, v, cu_seqlens, *, max_seqlen: int, scale: float, out) -> None:
    from torch.nn.attention import varlen

    offsets = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    if hasattr(varlen, "varlen_attn_out"):  # torch 2.13
        varlen.varlen_attn_out(out, q, k, v, *offsets, scale=scale)
    else:
        result = varlen.varlen_attn(q, k, v, *offsets, scale=scale)
        _copy_live(result[0] if isinstance(result, tuple) else result, cu_seqlens, out)


def _fa2(q, k, v, cu_seqlens, *, max_seqlen: int, scale: float, out) -> None:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    offsets = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    _copy_live(flash_attn_varlen_func(q, k, v, *offsets, softmax_scale=scale), cu_seqlens, out)


def _fa3(q, k, v, cu_seqlens, *, max_seqlen: int, scale: float, out) -> None:
    from flash_attn_interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    offsets = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    result = flash_attn_varlen_func(q, k, v, *offsets, softmax_scale=scale)
    # releases before 3.0.0b2 return the log-sum-exp as well
    _copy_live(result[0] if isinstance(result, tuple) else result, cu_seqlens, out)


def _triton(q, k, v, cu_seqlens, *, max_seqlen: int, scale: float, out) -> None:
    from .attention_triton import varlen_attention_triton

    varlen_attention_triton(q, k, v, cu_seqlens, scale=scale, out=out)


def _hopper(q, k, v, cu_seqlens, *, max_seqlen: int, scale: float, out, tickets=None) -> None:
    from .attention_hopper import varlen_attention_hopper

    varlen_attention_hopper(q, k, v, cu_seqlens, scale=scale, out=out, tickets=tickets)


@lru_cache(maxsize=len(BACKENDS))
def _implementation(backend: str) -> Callable[..., None]:
    if backend == "fa4":
        from .attention_fa4 import varlen_attention_fa4

        return varlen_attention_fa4
    return {
        "reference": _reference,
        "triton": _triton,
        "hopper": _hopper,
        "torch": _torch,
        "fa2": _fa2,
        "fa3": _fa3,
    }[backend]


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int,
    scale: float,
    out: torch.Tensor,
    backend: str,
    tickets: torch.Tensor | None = None,
) -> None:
    """Write the attention of each segment to `out` with the named backend.

    Args:
        q, k, v: [T, H, D] views, last axis contiguous; D a multiple of 8. With "fa3" and "fa4"
            every row must be finite, those past the last segment included.
        cu_seqlens: int32 [S + 1] on the same device; its tail repeats the last offset.
        max_seqlen: rows of the longest segment, or more. The grid of "torch", "fa2" and "fa3"
            follows from it, so they drop the rows of a longer segment; "fa4" takes it as a hint.
        scale: factor of the scores, positive.
        out: [T, H, D], contiguous, in the dtype of q, or with `FP8_BACKENDS` float8_e4m3fn. Rows
            from `cu_seqlens[-1]` on are left as they are.
        backend: one of `BACKENDS`; see `choose_backend`.
        tickets: int32 [2], zeros, and zeros again afterwards, of which "hopper" draws its tiles;
            segments of unequal length take less time so. None, and the others, go without.

    Raises:
        ValueError: the backend cannot be used here, or an operand is not as above.
        TypeError: dtypes disagree, or `cu_seqlens` is not int32.
    """
    check_tensors(
        "varlen_attention", q, k, v, cu_seqlens, scale, out, writes_fp8=backend in FP8_BACKENDS
    )
    check_backend(backend, q.dtype, q.device, q.shape[-1])
    check_tickets("varlen_attention", q, tickets)
    if q.numel() == 0 or cu_seqlens.shape[0] == 1:
        return
    if is_compiling() and backend not in ("triton", "hopper"):
        return  # others would run, on offsets that nobody has written
    drawn = {"tickets": tickets} if backend == "hopper" else {}
    _implementation(backend)(
        q, k, v, cu_seqlens, max_seqlen=max_seqlen, scale=scale, out=out, **drawn
    )
