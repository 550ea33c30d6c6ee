"""What towers of whole images are, as data.

All are dense: every image of a path has the same size, and no grid comes with it.

    step3p7   Step-3.7 and Step3-VL-10B ("StepVL"): PerceptionEncoder, pre-norm blocks with layer
              scale, positions from a table and from rope, two convolutions, a projector
    step3_vl  Step3 (321B): post-norm blocks, class rows, positions from a table, two convolutions,
              a projector
    internvl, qianfan_ocr
              pre-norm blocks with layer scale, a class row, positions from a table, a projector
              that joins patches

Their configs are read in step_spec.py and internvl.py.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from ..kernels.activation import Activation
from ..kernels.conv_rows import out_size

RopeAxes = Literal["wh", "hw"]
ROPE_AXES: tuple[RopeAxes, ...] = ("wh", "hw")


@dataclass(frozen=True)
class Downsample:
    """A convolution after the blocks: side of its square kernel, stride, padding, output width."""

    kernel: int
    stride: int
    padding: int
    width: int


@dataclass(frozen=True)
class ImageTowerSpec:
    """A tower of whole images: geometry, block, positions, convolutions, projector.

    Attributes:
        family: "step3p7", "step3_vl", "internvl" or "qianfan_ocr".
        hidden_size: Width D of the residual stream.
        num_heads: Attention heads H; the head dim is D / H.
        depth: Number of blocks.
        mlp_size: Width F of the plain MLP.
        downsamples: The convolutions after the blocks, in order; without any, all rows of the
            stream are an output.
        out_size: Width of a projected token; 0 for a tower without its projector.
        image_size: Pixels along a side of a whole image; with `patch_size`, the side of the
            position table.
        patch_size, in_channels: Pixels along a side of a patch, and channels.
        eps: Of every norm of the tower.
        block: "pre_norm" is x + f(norm(x)), "post_norm" is x + norm(f(x)).
        layer_scale: Whether branches are scaled by a vector.
        embed_norm: Whether a LayerNorm stands in front of the blocks.
        patch_bias, projector_bias: Whether these have biases.
        class_rows: Copies of the class row in front of the patches of an image.
        position_sampling: How the position table is resized to other images.
        rope_axes: Which axis turns the lower half of a head's pairs: "wh" the column, as in the
            released weights, "hw" the row; None for no rope.
        rope_theta: Base of the rotary embedding.
        norm: Kind of the norms of blocks.
        activation: Of the MLP.
        qkv_bias: Whether the layer of q, k and v has a bias.
        qk_norm: Whether an RMSNorm over all heads stands behind q, and one behind k.
        final_norm: Whether a LayerNorm stands behind the last block.
        merge_size: 0 for a projector that is one linear layer, or none; else it is a LayerNorm and
            two linear layers over squares of merge_size x merge_size patches.
        projector_activation: Between its two layers.
    """

    family: str
    hidden_size: int
    num_heads: int
    depth: int
    mlp_size: int
    downsamples: tuple[Downsample, ...]
    out_size: int
    block: Literal["pre_norm", "post_norm"]
    position_sampling: Literal["bilinear", "bicubic", "bicubic_antialias"]
    image_size: int = 728
    patch_size: int = 14
    in_channels: int = 3
    eps: float = 1e-5
    layer_scale: bool = False
    embed_norm: bool = False
    patch_bias: bool = False
    projector_bias: bool = False
    class_rows: int = 0
    rope_axes: RopeAxes | None = None
    rope_theta: float = 10000.0
    norm: Literal["layer", "rms"] = "layer"
    activation: Activation = "quick_gelu"
    qkv_bias: bool = True
    qk_norm: bool = False
    final_norm: bool = False
    merge_size: int = 0
    projector_activation: Activation = "gelu_erf"

    # what `fp8` and `stream` ask of any tower
    merger: ClassVar[Literal["none"]] = "none"
    gate_limit: ClassVar[None] = None
    deepstack_layers: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "image_size", "patch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"ImageTowerSpec: {name} = {value!r} must be a positive integer")
        if self.hidden_size % self.num_heads or self.head_dim % 8:
            raise ValueError(
                f"ImageTowerSpec: hidden_size = {self.hidden_size} over num_heads = "
                f"{self.num_heads} must give a head dim that is a multiple of 8 (16-byte rows of a "
                "head)"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"ImageTowerSpec: image_size = {self.image_size} is not a multiple of patch_size = "
                f"{self.patch_size}"
            )
        if self.rope_axes not in (None, *ROPE_AXES):
            raise ValueError(
                f"ImageTowerSpec: rope_axes = {self.rope_axes!r}; use 'wh' (as released weights "
                "have it) or 'hw' (as transformers before 5.23 computes it)"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Pixel values of a patch."""
        return self.in_channels * self.patch_size**2

    @property
    def position_grid(self) -> int:
        """Side of the position table."""
        return self.image_size // self.patch_size

    @property
    def state_size(self) -> int:
        """Width of a row of the state: of a token before the projector, or of the stream."""
        return self.downsamples[-1].width if self.downsamples else self.hidden_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches of an image of height x width pixels.

        Raises:
            ValueError: not whole patches, too few for the convolutions, or not whole squares of
                `merge_size`.
        """
        side = self.patch_size
        grid = height // side, width // side
        joined = side * (self.merge_size or 1)
        if height % joined or width % joined or min(height, width) < 1:
            raise ValueError(
                f"images of {height} x {width} pixels: both sides must be multiples of {joined}"
            )
        if min(self.stages(*grid)[-1]) < 1:
            raise ValueError(
                f"images of {height} x {width} pixels: both sides must be large enough for the "
                "convolutions after the blocks"
            )
        return grid

    def stages(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Grids of an image: its patches, and what each convolution or joining makes of them."""
        grids = [(rows, columns)]
        for conv in self.downsamples:
            h, w = (out_size(n, conv.kernel, conv.stride, conv.padding) for n in grids[-1])
            grids.append((h, w))
        if self.merge_size:
            grids.append((rows // self.merge_size, columns // self.merge_size))
        return grids

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, for JSON."""
        return asdict(self)
