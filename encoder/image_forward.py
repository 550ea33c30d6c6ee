"""The forward of towers of whole images: images of one size, eager, recorded and replayed alike.

Every image has the same rows, so positions, angles and the places of the convolutions are constants
of a size (`ImageSize`); only the number of live images is read on the device, from the grid table.
Nothing here synchronises or moves data to or from the host. Rows of images past the live ones are
finite in the residual stream and in every intermediate that a kernel multiplies.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..kernels.add_norm import add_norm_
from ..kernels.attention import FP8_BACKENDS, varlen_attention
from ..kernels.conv_rows import conv_rows
from ..kernels.image_embed import image_embed
from ..kernels.linear import empty_output, linear
from ..kernels.norm import norm
from ..kernels.residual import residual
from ..kernels.rope import rope_
from ..kernels.zero_padding import ZeroedPadding
from .attended import Attended
from .fp8 import Fp8Block, Fp8Layer, linear_of_rows, mlp_of_rows
from .image_spec import ImageTowerSpec
from .image_weights import ImageBlock, ImageTowerWeights
from .stream import NormWeights, Stream

QK_EPS = 1e-6  # of the norms of q and k
MERGE_EPS = 1e-5  # of the norm of joined patches


class ImageSize:
    """What a tower needs to know of images of height x width pixels.

    Attributes:
        height, width: In pixels.
        stages: Grids of patches, and of what each convolution or joining makes of them.
        rows: Rows R of an image in the residual stream, class rows included.
        patches, tokens: Patches of an image, and tokens that leave the tower.
        table: [R, D] what is added to each row; class rows whole.
        cos, sin: [R, head_dim / 2] fp32 angles; None without rope.
        state_rows: Rows of an image in the state: its tokens, or all of R without convolutions.
        counts: int32, rows of one image after the embedding and in each later stage.
    """

    def __init__(self, weights: ImageTowerWeights, height: int, width: int):
        """Constants for `weights`, on their device.

        Raises:
            ValueError: sides that the tower cannot cut into patches.
        """
        spec, tensors = weights.spec, weights.tensors
        device = tensors["patch.weight"].device
        self.height, self.width = height, width
        self.stages = spec.stages(*spec.grid(height, width))
        sizes = [h * w for h, w in self.stages]
        self.patches, self.tokens = sizes[0], sizes[-1]
        self.rows = spec.class_rows + self.patches
        self.state_rows = self.tokens if spec.downsamples else self.rows
        self.counts = torch.tensor([self.rows, *sizes[1:]], dtype=torch.int32, device=device)
        self.table = torch.empty(self.rows, spec.hidden_size, dtype=weights.wide, device=device)
        self.cos, self.sin = _angles(spec, *self.stages[0], device)
        self.read_positions(weights)

    def constants(self) -> list[torch.Tensor]:
        """All its tensors."""
        tensors = self.counts, self.table, self.cos, self.sin
        return [tensor for tensor in tensors if tensor is not None]

    def read_positions(self, weights: ImageTowerWeights) -> None:
        """Fill `table` from the weights, in place."""
        spec, table = weights.spec, weights.tensors["position.table"].to(weights.wide)
        table = table.view(-1, spec.hidden_size)
        side, skipped = spec.position_grid, len(table) - spec.position_grid**2
        grid = table[skipped:].T.reshape(1, -1, side, side)
        if self.stages[0] != (side, side):
            mode, _, antialias = spec.position_sampling.partition("_")
            grid = F.interpolate(
                grid, self.stages[0], mode=mode, align_corners=False, antialias=bool(antialias)
            )
        self.table[spec.class_rows :] = grid.flatten(2)[0].T
        if spec.class_rows:
            self.table[: spec.class_rows] = weights.tensors["class_row"] + table[:skipped]


def _angles(
    spec: ImageTowerSpec, rows: int, columns: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """cos and sin of every patch, fp32 computed on the CPU, as transformers computes them."""
    if spec.rope_axes is None:
        return None, None
    half = spec.head_dim // 2
    frequency = 1.0 / spec.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    axes = (column, row) if spec.rope_axes == "wh" else (row, column)
    angle = torch.cat([axis.flatten()[:, None] * frequency for axis in axes], 1)
    return angle.cos().to(device), angle.sin().to(device)


@dataclass(frozen=True)
class ImageBatch:
    """Images of one size on the device.

    Attributes:
        pixel_values: [I * patches, P] in the tower's dtype, the images as they lie in memory;
            those past the live ones may hold anything.
        grid: [I, 3] int32; an image is live if its first number is not zero.
        size: Of the images.
    """

    pixel_values: torch.Tensor
    grid: torch.Tensor
    size: ImageSize


class _Workspace:
    """Intermediates of one forward, shared by all blocks.

    Padding rows that their writers leave alone are zeroed once, since readers multiply them. Live
    rows are uninitialised: every block writes them before it reads them.
    """

    def __init__(self, weights: ImageTowerWeights, x: torch.Tensor, padding: ZeroedPadding):
        spec, block, T = weights.spec, weights.blocks[0], x.shape[0]
        in_fp8 = weights.fp8.plan is not None
        self.normed = torch.empty_like(x)  # pre-norm: the norm; post-norm: the branch
        if spec.qk_norm:
            # apart, since a norm takes contiguous rows
            self.qkv = x.new_empty(3, T, spec.num_heads, spec.head_dim)
            # of v alone: the norms of q and k write zeros to theirs
            padding.of(self.qkv[2])
        else:
            qkv = empty_output(x, block.qkv_weight, padding=padding, leaves_padding=in_fp8)
            self.qkv = qkv.view(T, 3, spec.num_heads, spec.head_dim)
        shape = T, spec.num_heads, spec.head_dim
        self.attended = Attended(x, shape, weights.fp8.blocks, padding)
        self.up = empty_output(
            x, block.up_weight, spec.activation, padding=padding, leaves_padding=in_fp8
        )


def image_forward(
    weights: ImageTowerWeights,
    batch: ImageBatch,
    outputs: Mapping[str, torch.Tensor],
    attention: str,
) -> None:
    """Run the tower on `batch` and write `outputs`.

    Args:
        weights: Prepared weights.
        batch: What to encode.
        outputs: "last_hidden_state" [I * state_rows, state_size] and, with a projector,
            "pooler_output" [I * tokens, out_size]; live rows first, padding rows of any value.
        attention: Backend of the attention.
    """
    device = batch.pixel_values.device
    # Triton launches on the current device, and autocast would change dtypes between kernels
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, torch.autocast(device.type, enabled=False):
        _forward(weights, batch, outputs, attention)


def _forward(
    weights: ImageTowerWeights,
    batch: ImageBatch,
    outputs: Mapping[str, torch.Tensor],
    attention: str,
) -> None:
    spec, tensors, size = weights.spec, weights.tensors, batch.size
    live_images = (batch.grid[:, 0] > 0).sum(dtype=torch.int32)
    live = size.counts * live_images
    steps = torch.arange(
        0, (len(batch.grid) + 1) * size.rows, size.rows, dtype=torch.int32, device=live.device
    )
    cu_seqlens = torch.minimum(steps, live[0])
    images = batch.pixel_values.view(len(batch.grid), spec.in_channels, size.height, size.width)
    x = image_embed(
        images, tensors["patch.weight"], tensors.get("patch.bias"), size.table,
        patch=spec.patch_size, live_rows=live[:1],
    )  # fmt: skip
    if spec.embed_norm:
        x = norm(
            x, tensors["embed_norm.weight"], tensors["embed_norm.bias"], spec.eps,
            kind="layer", live_rows=live[:1],
        )  # fmt: skip
    rows, fp8 = live[:1], weights.fp8
    with ZeroedPadding(rows) as padding:
        work = _Workspace(weights, x, padding)
    pairs = zip(weights.blocks, fp8.blocks, strict=True)
    if spec.block == "pre_norm":
        stream = Stream(x, rows, in_fp8=fp8.plan is not None)
        for block, in_fp8 in pairs:
            _pre_norm_block(spec, block, in_fp8, stream, size, cu_seqlens, rows, work, attention)
        x = stream.settled()
    else:
        for block, in_fp8 in pairs:
            _post_norm_block(spec, block, in_fp8, x, size, cu_seqlens, rows, work, attention)
    finish = _downsample if spec.downsamples else _merge
    finish(weights, x, size, live, outputs)


def _project(
    block: ImageBlock,
    x: torch.Tensor,
    in_fp8: Fp8Layer | None,
    live: torch.Tensor,
    work: _Workspace,
) -> None:
    """q, k and v of the rows of x, into `work.qkv`; in fp8 where the layer is."""
    if block.q_norm is None or block.k_norm is None:
        _product(x, block.qkv_weight, block.qkv_bias, in_fp8, live, work.qkv.flatten(1))
        return
    # `fp8` refuses plans with this layer in towers that have these norms
    biases = (None,) * 3 if block.qkv_bias is None else block.qkv_bias.chunk(3)
    parts = work.qkv.flatten(2)
    for rows, weight, bias in zip(parts, block.qkv_weight.chunk(3), biases, strict=True):
        linear(x, weight, bias, out=rows, live_rows=live)
    for rows, weight in zip(parts[:2], (block.q_norm, block.k_norm), strict=True):
        norm(rows, weight, None, QK_EPS, kind="rms", live_rows=live, out=rows)


def _attention(
    spec: ImageTowerSpec,
    in_fp8: Fp8Block,
    size: ImageSize,
    cu_seqlens: torch.Tensor,
    live: torch.Tensor,
    work: _Workspace,
    attention: str,
) -> torch.Tensor:
    """Attention of the images in `work.qkv`, each to itself; [T, D], as `proj` reads it."""
    if size.cos is not None and size.sin is not None:
        rope_(work.qkv, size.cos, size.sin, live)
    q, k, v = work.qkv.unbind(0 if spec.qk_norm else 1)
    casts = attention in FP8_BACKENDS
    varlen_attention(
        q, k, v, cu_seqlens, max_seqlen=size.rows, scale=spec.head_dim**-0.5,
        out=work.attended.target(in_fp8, casts=casts), backend=attention,
    )  # fmt: skip
    return work.attended.rows(in_fp8, casts=casts)


def _pre_norm_block(
    spec: ImageTowerSpec,
    block: ImageBlock,
    in_fp8: Fp8Block,
    stream: Stream,
    size: ImageSize,
    cu_seqlens: torch.Tensor,
    live: torch.Tensor,
    work: _Workspace,
    attention: str,
) -> None:
    """Stream += f(norm(stream)) twice; the biases of both products stay out of it."""
    norm1: NormWeights = block.norm1_weight, block.norm1_bias, block.norm1_offset
    if in_fp8.qkv is not None:
        bias = in_fp8.qkv_bias if in_fp8.fits else block.qkv_bias
        stream.norm_linear_fp8(norm1, in_fp8.qkv, bias, spec, work.qkv.flatten(1))
    else:
        stream.norm(norm1, spec, out=work.normed)
        _project(block, work.normed, None, live, work)
    attended = _attention(spec, in_fp8, size, cu_seqlens, live, work, attention)
    if in_fp8.proj is not None:
        stream.add_linear_fp8(attended, in_fp8.proj)
    else:
        stream.add_linear(attended, block.proj_weight)
    norm2: NormWeights = block.norm2_weight, block.norm2_bias, block.norm2_offset
    if in_fp8.up is not None and in_fp8.down is not None:
        stream.norm_mlp_fp8(norm2, in_fp8.up, block.up_bias, in_fp8.down, spec, spec.activation)
        return
    if in_fp8.up is not None:
        stream.norm_linear_fp8(norm2, in_fp8.up, block.up_bias, spec, work.up, spec.activation)
    else:
        stream.norm(norm2, spec, out=work.normed)
        linear(
            work.normed, block.up_weight, block.up_bias,
            activation=spec.activation, out=work.up, live_rows=live,
        )  # fmt: skip
    if in_fp8.down is not None:
        stream.add_linear_fp8(work.up, in_fp8.down)
    else:
        stream.add_linear(work.up, block.down_weight)


def _post_norm_block(
    spec: ImageTowerSpec,
    block: ImageBlock,
    in_fp8: Fp8Block,
    x: torch.Tensor,
    size: ImageSize,
    cu_seqlens: torch.Tensor,
    live: torch.Tensor,
    work: _Workspace,
    attention: str,
) -> None:
    """x += norm(f(x)) twice."""
    assert block.norm1_bias is not None  # of a LayerNorm
    assert block.norm2_bias is not None
    _project(block, x, in_fp8.qkv, live, work)
    attended = _attention(spec, in_fp8, size, cu_seqlens, live, work, attention)
    _product(attended, block.proj_weight, block.proj_bias, in_fp8.proj, live, work.normed)
    add_norm_(x, work.normed, block.norm1_weight, block.norm1_bias, spec.eps, live)
    _post_norm_mlp(spec, block, in_fp8, x, live, work)
    add_norm_(x, work.normed, block.norm2_weight, block.norm2_bias, spec.eps, live)


def _post_norm_mlp(
    spec: ImageTowerSpec,
    block: ImageBlock,
    in_fp8: Fp8Block,
    x: torch.Tensor,
    live: torch.Tensor,
    work: _Workspace,
) -> None:
    """`work.normed` = down(f(up(x)))."""
    if in_fp8.up is not None and in_fp8.down is not None:
        mlp_of_rows(
            x, in_fp8.up, block.up_bias, in_fp8.down, block.down_bias, spec.activation, live,
            work.normed,
        )  # fmt: skip
        return
    if in_fp8.up is not None:
        linear_of_rows(x, in_fp8.up, block.up_bias, live, work.up, spec.activation)
    else:
        linear(
            x, block.up_weight, block.up_bias,
            activation=spec.activation, out=work.up, live_rows=live,
        )  # fmt: skip
    _product(work.up, block.down_weight, block.down_bias, in_fp8.down, live, work.normed)


def _product(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    in_fp8: Fp8Layer | None,
    live: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`out` = rows @ weight.T + bias, in fp8 where the layer is."""
    if in_fp8 is None:
        linear(rows, weight, bias, out=out, live_rows=live)
    else:
        linear_of_rows(rows, in_fp8, bias, live, out)


def _downsample(
    weights: ImageTowerWeights,
    x: torch.Tensor,
    size: ImageSize,
    live: torch.Tensor,
    outputs: Mapping[str, torch.Tensor],
) -> None:
    """The convolutions, each a gather and a product, and the projector."""
    spec, tensors = weights.spec, weights.tensors
    skip, offset = spec.class_rows, weights.offset
    for j, conv in enumerate(spec.downsamples):
        is_last = j == len(spec.downsamples) - 1
        live_rows = live[j + 1 : j + 2]
        rows = conv_rows(
            x, size.stages[j], skip=skip, kernel=conv.kernel, stride=conv.stride,
            padding=conv.padding, offset=offset, live_rows=live_rows,
        )  # fmt: skip
        x = linear(
            rows, tensors[f"down.{j}.weight"], tensors[f"down.{j}.bias"],
            out=outputs["last_hidden_state"] if is_last else None, live_rows=live_rows,
        )  # fmt: skip
        skip, offset = 0, None
    if spec.out_size:
        linear(
            x, tensors["projector.weight"], tensors.get("projector.bias"),
            out=outputs["pooler_output"], live_rows=live[-1:],
        )  # fmt: skip


def _merge(
    weights: ImageTowerWeights,
    x: torch.Tensor,
    size: ImageSize,
    live: torch.Tensor,
    outputs: Mapping[str, torch.Tensor],
) -> None:
    """The stream behind the last norm, and the projector of joined patches."""
    spec, tensors, state = weights.spec, weights.tensors, outputs["last_hidden_state"]
    if spec.final_norm:
        norm(
            x, tensors["final_norm.weight"], tensors["final_norm.bias"], spec.eps,
            kind="layer", offset=weights.offset, live_rows=live[:1], out=state,
        )  # fmt: skip
    else:
        residual(x, weights.offset, live_rows=live[:1], out=state)
    if not spec.out_size:
        return
    live_rows, side = live[1:2], spec.merge_size
    # squares of patches side by side are the rows of a convolution whose stride is its kernel
    joined = conv_rows(
        state, size.stages[0], skip=spec.class_rows, kernel=side, stride=side, padding=0,
        live_rows=live_rows,
    )  # fmt: skip
    norm(
        joined, tensors["projector.norm.weight"], tensors["projector.norm.bias"], MERGE_EPS,
        kind="layer", live_rows=live_rows, out=joined,
    )  # fmt: skip
    weight, activation = tensors["projector.fc1.weight"], spec.projector_activation
    with ZeroedPadding(live_rows) as padding:
        hidden = empty_output(
            joined, weight, activation, padding=padding, reader=tensors["projector.fc2.weight"]
        )
    linear(
        joined, weight, tensors["projector.fc1.bias"],
        activation=activation, live_rows=live_rows, out=hidden,
    )  # fmt: skip
    linear(
        hidden, tensors["projector.fc2.weight"], tensors["projector.fc2.bias"],
        out=outputs["pooler_output"], live_rows=live_rows,
    )  # fmt: skip
