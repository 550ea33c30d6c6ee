"""FlashAttention-4 (CuTe DSL) as an optional backend: forward, bidirectional, packed segments.

Two ways to have it, neither imported before it is needed:

1. Prebuilt objects for compute capability 9.0: files `fa4_sm90_d{D}_{m}x{n}[_rs].so` (head dim,
   tile rows of q x of k, `_rs` where the probabilities stay in registers) in the folder named by
   `VITGRAPH_FA4_DIR`, else `~/.cache/vitgraph/fa4`. They are bf16 and need the package
   apache-tvm-ffi alone. Preferred where one fits, since nothing is compiled at run time.
2. The package flash-attn-4 (4.0.0b36), which compiles each tile at its first call.

Both take strided q, k, v, run on torch's current stream, and can be captured after one warm-up
call. **Stale rows must be finite**: the last tile of a segment multiplies rows past its end by 0,
so a NaN or infinity there reaches the output. Keep the padding of the qkv buffer at zero.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from .attention import check_tensors

_OBJECT_NAME = re.compile(r"fa4_sm90_d(\d+)_(\d+)x(\d+)(_rs)?\.so")
_PIP = "pip install 'vitgraph[fa4]'"


@dataclass(frozen=True)
class Tile:
    """Rows of q and of k that one program handles; `rs`: probabilities are kept in registers."""

    m: int
    n: int
    rs: bool

    def __str__(self) -> str:
        return f"{self.m}x{self.n}{'_rs' if self.rs else ''}"


# In the order in which one stands in for another that is missing.
TILES = (
    Tile(192, 144, False),
    Tile(128, 128, True),
    Tile(128, 112, True),
    Tile(128, 176, True),
    Tile(64, 112, True),
)


def choose_tile(max_seqlen: int, num_rows: int, available: Set[Tile] = frozenset(TILES)) -> Tile:
    """Pick a tile by the longest segment and the rows of the whole buffer, among `available`.

    Measured on an H200 with 16 heads of 64, 72 and 80: 1 x 196 rows 64x112_rs; 64 x 256 rows
    128x128_rs; 1 x 784 rows 128x112_rs; 8 x 784 rows and segments of 2,048 rows and more 192x144. A
    segment that leaves most of the device idle wants the smaller tile, hence `num_rows`.
    """
    if max_seqlen <= 256:
        best = Tile(64, 112, True) if num_rows <= 2048 else Tile(128, 128, True)
    elif max_seqlen <= 1024 and num_rows <= 2048:
        best = Tile(128, 112, True)
    else:
        best = Tile(192, 144, False)
    for tile in (best, *TILES):
        if tile in available:
            return tile
    raise ValueError(f"choose_tile: none of the tiles {', '.join(map(str, TILES))} is available")


def object_folder() -> Path:
    """Where prebuilt objects are looked for."""
    folder = os.environ.get("VITGRAPH_FA4_DIR")
    return Path(folder) if folder else Path.home() / ".cache" / "vitgraph" / "fa4"


@lru_cache(maxsize=8)
def _objects(folder: Path) -> dict[int, dict[Tile, Path]]:
    found: dict[int, dict[Tile, Path]] = {}
    for path in sorted(folder.glob("fa4_sm90_*.so")):
        if match := _OBJECT_NAME.fullmatch(path.name):
            d, m, n = (int(g) for g in match.groups()[:3])
            found.setdefault(d, {})[Tile(m, n, match[4] is not None)] = path
    return found


def has_package() -> bool:
    """True if flash-attn-4 is installed. Imports nothing (flash-attn 2 shares its top package)."""
    spec = importlib.util.find_spec("flash_attn")
    folders = spec.submodule_search_locations if spec else None
    return any((Path(f) / "cute" / "interface.py").is_file() for f in folders or ())


@lru_cache(maxsize=64)
def _object_reason(
    folder: Path,
    capability: tuple[int, int],
    head_dim: int | None,
    dtype: torch.dtype | None,
) -> str | None:
    """Why no prebuilt object serves this call; None if one does."""
    objects = _objects(folder)
    if not objects:
        return f"no prebuilt object in {folder}"
    if capability != (9, 0):
        return f"prebuilt objects need compute capability 9.0, this is {_dotted(capability)}"
    if head_dim is not None and not any(t in objects.get(head_dim, {}) for t in TILES):
        return f"no prebuilt object for head dim {head_dim} in {folder}, only {sorted(objects)}"
    if dtype not in (None, torch.bfloat16):
        return f"prebuilt objects are bfloat16, not {dtype}"
    if importlib.util.find_spec("tvm_ffi") is None:
        return "prebuilt objects need tvm_ffi: pip install apache-tvm-ffi"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def unusable_reason(
    device: torch.device, head_dim: int | None = None, dtype: torch.dtype | None = None
) -> str | None:
    """One line on why FA4 cannot run here, or None if it can."""
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability not in ((9, 0), (10, 0)):
        return f"needs compute capability 9.0 or 10.0, this is {_dotted(capability)}"
    if dtype not in (None, torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {dtype}"
    if head_dim is not None and (head_dim % 8 or not 8 <= head_dim <= 128):
        return f"needs a head dim that is a multiple of 8 up to 128, not {head_dim}"
    reason = _object_reason(object_folder(), capability, head_dim, dtype)
    if reason is None or has_package():
        return None
    return f"flash-attn-4 is not installed ({_PIP}), and {reason}"


def usable_tiles(
    device: torch.device, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tile, ...]:
    """Those of `TILES` that `varlen_attention_fa4` takes as `tile` here; none where it has no say.

    With the package every tile counts, though a device may refuse one when it is compiled.
    """
    if unusable_reason(device, head_dim, dtype) is not None:
        return ()
    capability = torch.cuda.get_device_capability(device)
    if _object_reason(object_folder(), capability, head_dim, dtype) is None:
        available = _objects(object_folder())[head_dim]
        return tuple(tile for tile in TILES if tile in available)
    return TILES if capability == (9, 0) and head_dim <= 96 else ()


@lru_cache(maxsize=64)
def _load_object(path: Path) -> Callable[..., None]:
    import tvm_ffi  # pyright: ignore[reportMissingImports]

    return tvm_ffi.load_module(str(path)).func


@lru_cache(maxsize=1)
def _load_package() -> Callable[..., object]:
    from flash_attn.cute.interface import _flash_attn_fwd  # pyright: ignore[reportMissingImports]

    return _flash_attn_fwd


def varlen_attention_fa4(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int,
    scale: float,
    out: torch.Tensor,
    tile: Tile | None = None,
) -> None:
    """Write the attention of each segment to `out`; see the module docstring.

    Args:
        q, k, v: [T, H, D] bf16 (or fp16 with the package) views, last axis contiguous. Every row
            must be finite, those past the last segment included.
        cu_seqlens: int32 [S + 1] on the same device; its tail repeats the last offset.
        max_seqlen: about the longest segment, in rows: a hint for the choice of tile.
        scale: factor of the scores, positive.
        out: [T, H, D], contiguous. Rows from `cu_seqlens[-1]` on are left as they are.
        tile: overrides `choose_tile`, for the benchmark.

    Raises:
        ValueError: FA4 cannot run here, or shapes or strides are not as above.
    """
    check_tensors("varlen_attention_fa4", q, k, v, cu_seqlens, scale, out, writes_fp8=False)
    head_dim = q.shape[-1]
    if reason := unusable_reason(q.device, head_dim, q.dtype):
        raise ValueError(f"varlen_attention_fa4: {reason}")
    if q.numel() == 0 or cu_seqlens.shape[0] == 1:
        return
    capability = torch.cuda.get_device_capability(q.device)
    folder = object_folder()
    if _object_reason(folder, capability, head_dim, q.dtype) is None:
        paths = _objects(folder)[head_dim]
        chosen = tile or choose_tile(max_seqlen, q.shape[0], paths.keys())
        # after the offsets: seqused q and k, page table, window left and right, sink, block
        # sparsity, (auxiliary tensors, scalars), and two schedules for over 256 segments
        _load_object(paths[chosen])(
            q, k, v, out, None, scale, cu_seqlens, cu_seqlens,
            None, None, None, None, None, None, None, (None, None), None, None,
        )  # fmt: skip
        return
    options = {}
    if capability == (9, 0) and head_dim <= 96:  # the tiles were measured there
        chosen = tile or choose_tile(max_seqlen, q.shape[0])
        options = {"tile_mn": (chosen.m, chosen.n), "mma_pv_is_rs": chosen.rs}
        options["intra_wg_overlap"] = True
    _load_package()(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        out=out,
        **options,
    )
