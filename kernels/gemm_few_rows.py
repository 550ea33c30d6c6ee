"""Matrix product of a few hundred rows, for compute capability 9.0: latency before throughput.

    y = f(x @ weight.T + bias)              "rounded", to the dtype of x
    p[s] = x[:, Ks] @ weight[:, Ks].T       "partial" sums, fp32, over the s-th part Ks of K

x [T, K], weight [N, K], bias [N], y [T, N], p [S, T, N]; gated, y = f(gate) * up as in
gated_linear.py. With so few rows a product is a microsecond or three of arithmetic behind a weight
matrix that has to come from memory, so what counts is when that begins:

- One tile a program, no wave after the first.
- A program asks for its weights before the kernel that writes x has ended (pdl.py), and does
  little before: it takes the place of a program of that kernel, so nothing else hides its start.
- All its warps multiply, and each step along K waits for all of them before it is overwritten, or a
  warp is kept apart for loads, which starts later. The table says which is faster.
- Where tiles of columns are too few for the GPU (proj, down), K is cut into parts. Nobody adds
  them up in a kernel of its own: the norm that follows reads the stream anyway, and adds the
  partial sums of all parts on the way (`partials` of norm.py and residual.py). Sums are taken in
  the order of the parts, so the result is the same each time.
- The norm between `proj` and `up` may take no kernel at all (deferred_norm.py).

Rows past the live ones: tiles without a live row are left alone, rows of others are computed.

Written in Gluon, which has no interpreter (gemm_few_rows_kernel.py). `partials_ref` is the
definition in PyTorch. https://arxiv.org/abs/2402.00025 (split K), PTX ISA griddepcontrol (start).
"""

import itertools

import torch

from .few_rows_tuning import FewRowsConfig, few_rows_tile
from .gemm import check_arguments, hopper_reason, is_aligned
from .gemm_tuning import RESIDUAL
from .launch import launch_kernel
from .pdl import starts_early
from .rows import ceil_div
from .tables import tuning

BLOCK_K = 64
STORE_N = 64  # columns of the output that are stored at a time: 128 bytes, the widest swizzle
GROUP = STORE_N  # columns whose moments deferred_norm.py takes together
MOST_GROUPS = 32  # of them, a power of two


def choose_partials(M: int, weight: torch.Tensor) -> FewRowsConfig | None:
    """The tile for `linear_partials` of M rows; None where adding to the stream in place is faster.

    It depends on the shape, dtype, device and alignment of `weight` alone.

    Raises:
        ValueError: the user's table for this GPU is damaged.
    """
    if not weight.is_cuda:
        return None
    N, K = weight.shape
    tile = few_rows_tile(M, N, K, RESIDUAL, tuning(weight.device).few_rows)
    if tile is None or hopper_reason(weight.device, weight.dtype) or not is_aligned(weight):
        return None
    return tile


def partials_ref(x: torch.Tensor, weight: torch.Tensor, splits: int) -> torch.Tensor:
    """Plain PyTorch definition of p, fp32 (fp64 for fp64)."""
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    steps, longer = divmod(ceil_div(x.shape[1], BLOCK_K), splits)
    edges = [(s * steps + min(s, longer)) * BLOCK_K for s in range(splits + 1)]
    return torch.stack([
        x[:, a:b].to(wide) @ weight[:, a:b].to(wide).t() for a, b in itertools.pairwise(edges)
    ])  # fmt: skip


def linear_partials(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    config: FewRowsConfig,
    live_rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """p of the module docstring: [config.splits, T, N] fp32, whose sum is `x @ weight.T`.

    Args:
        x: [T, K]; weight: [N, K]; fp16 or bf16.
        config: tile and number of parts.
        live_rows: int32 [1]; tiles without a live row are left alone.
        out: where to write; a new tensor if None.

    Raises:
        ValueError: shapes disagree, rows that do not start at multiples of 16 bytes, more parts
            than steps along K, or a device or dtype that the kernel does not run with.
        TypeError: dtypes or devices disagree.
    """
    check_arguments("linear_partials", x, weight, None, None, None, None, live_rows)
    if reason := hopper_reason(x.device, x.dtype):
        raise ValueError(f"linear_partials cannot run here: {reason}; use `linear`")
    (M, K), N = x.shape, weight.shape[0]
    if config.splits > ceil_div(K, BLOCK_K):
        raise ValueError(
            f"linear_partials: splits = {config.splits} of K = {K} must be at most its "
            f"{ceil_div(K, BLOCK_K)} steps of {BLOCK_K}"
        )
    if config.splits * M * N >= 2**31:
        raise ValueError(
            f"linear_partials: [{config.splits}, {M}, {N}] are 2**31 sums or more; use `linear`, "
            "which is faster for so many rows"
        )
    if out is None:
        out = torch.empty((config.splits, M, N), dtype=torch.float32, device=x.device)
    is_right = out.shape == (config.splits, M, N) and out.dtype == torch.float32
    if not is_right or not out.is_contiguous() or out.device != x.device:
        raise ValueError(
            f"linear_partials: out must be contiguous [{config.splits}, {M}, {N}] fp32 on "
            f"{x.device}, got {list(out.shape)} {out.dtype} on {out.device}"
        )
    if not is_aligned(x, weight):
        raise ValueError(
            "linear_partials: rows must start at multiples of 16 bytes, got strides "
            f"{x.stride()} and {weight.stride()}; use `linear`"
        )
    if out.numel():
        launch(x, weight, None, out, live_rows, config=config)
    return out


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    live_rows: torch.Tensor | None,
    *,
    activation: str | None = None,
    is_gated: bool = False,
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    added: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor] | None = None,
    scaled: tuple[torch.Tensor, torch.Tensor | None, float] | None = None,
    config: FewRowsConfig,
) -> None:
    """Launch on checked operands: 16-bit, 16-byte aligned rows, on compute capability 9.0.

    `out` is [M, N] of x's dtype ([M, N / 2] when gated) if `config.splits` is 1 and it has two
    dimensions; else [splits, M, N] fp32, contiguous, for sums without bias or activation. With
    `rotation`, position and turns of rotary_linear.py, pairs of columns are turned. Halves of
    deferred_norm.py: with `added`, stream, gain, offset and moments, `out` are scaled rows; with
    `scaled`, moments, sums and eps, x are.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .gemm_few_rows_kernel import gemm_few_rows_kernel

    block_m, block_n = config.block_m, config.block_n
    head = 1 << (block_n.bit_length() - 1)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

    def blocks(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)

    (M, K), N = x.shape, weight.shape[0]
    halves = 2 if is_gated else 1
    is_partial = out.ndim == 3
    stream, gain, offset, moments = added or (None, None, None, None)
    sums, eps = None, 0.0
    if scaled is not None:
        moments, sums, eps = scaled
    launch_kernel(
        gemm_few_rows_kernel,
        (ceil_div(M, block_m), ceil_div(N, block_n), config.splits),
        blocks(x, block_m, BLOCK_K),
        blocks(weight, head // halves, BLOCK_K),
        blocks(weight, (block_n - head) // halves, BLOCK_K) if block_n > head else None,
        bias,
        *(rotation or (None, None)),
        None if stream is None else blocks(stream, block_m, STORE_N),
        gain, offset, moments, sums,
        None if is_partial else blocks(out, block_m, STORE_N),
        out if is_partial else None,
        live_rows, M, N, K, *divmod(ceil_div(K, BLOCK_K), config.splits), eps,
        ACTIVATION=activation or "", IS_GATED=is_gated, IS_RMS=sums is None,
        MOST_GROUPS=MOST_GROUPS,
        STAGES=config.num_stages, HAS_PRODUCER=config.producer,
        num_warps=block_m // 16, maxnreg=config.max_registers, launch_pdl=starts_early(x),
    )  # fmt: skip
