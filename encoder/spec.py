"""What a tower is, as data: everything that kernels, weights and capture need to know of it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..kernels.positions import Sampling

MAX_WINDOW_SIDE = 16


@dataclass(frozen=True)
class EncoderSpec:
    """A vision tower of packed patches: geometry, block, positions, merger.

    Attributes:
        family: Name of the tower family, as transformers' `model_type`.
        hidden_size: Width D of the residual stream.
        num_heads: Attention heads H; the head dim is D / H.
        depth: Number of blocks.
        mlp_size: Width F of the MLP (of one half of it when gated).
        out_size: Width of a merged token; without a merger that of a patch, D.
        patch_size, temporal_patch_size, in_channels: Pixels, frames and channels of a patch.
        merge_size: Patches along a side of a merged token; pixel rows come in blocks of them, but
            row by row with merger "mean". 1 is one token a patch, and patches row by row.
        norm: LayerNorm or RMSNorm, with `eps`.
        mlp: "plain" is fc2(act(fc1(x))), "gated" is down(act(gate(x)) * up(x)).
        activation: Activation of the MLP. The mergers use the exact (erf) GELU.
        patch_bias: Whether the patch embedding has a bias.
        qkv_bias, proj_bias, mlp_bias: Whether these linear layers of a block have biases.
        qk_norm: Whether each head of q and k goes through an RMSNorm before the rotation.
        gate_limit: Bound of both halves of a gated MLP: gate from above, up on both sides; None
            for none. That of a "glm" merger as well.
        embed_norm: Norm of the embedded patches, with `eps`, before learned positions are added.
        position_grid: Side of the learned position table, 0 for none.
        position_sampling: How the table is resampled to a grid: "bilinear_corners" puts its
            corners on those of the grid, "bilinear" and "bicubic" put the edges of its cells on
            those of the grid's patches, and repeat it past its border; "bilinear_antialias"
            averages it for a grid that is smaller.
        window_size: Patches along a side of an attention window, 0 for none.
        full_attention_layers: Blocks that attend over whole frames in a tower with windows.
        deepstack_layers: Blocks after which a deepstack merger reads the stream.
        rope_theta: Base of the axial rotary embedding, 0 for none.
        segments: What attends to itself: a frame, or all frames of an item ("clips").
        frame_positions: Frames that have fixed sinusoidal positions, which patches of items of
            several frames get; no item may have more. 0 for none.
        images_only: Whether every item has one frame.
        merger: "mlp" is norm, joining, fc2(gelu(fc1(x))); "glm" is norm, a convolution that joins
            (whose output is the tower's last hidden state), a projection, LayerNorm, GELU and a
            gated MLP of width `merger_size`; "none" is a norm of the stream, whose output is the
            last hidden state, and leaves merging to what reads it; "mean" is that norm, a mean over
            the frames of an item, and joining, which leaves all layers to what reads it.
        merger_size: Width of the gated MLP of a "glm" merger, 0 for others.
    """

    family: str
    hidden_size: int
    num_heads: int
    depth: int
    mlp_size: int
    out_size: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    norm: Literal["layer", "rms"]
    mlp: Literal["plain", "gated"]
    activation: Literal["quick_gelu", "gelu_tanh", "silu"]
    in_channels: int = 3
    eps: float = 1e-6
    patch_bias: bool = False
    qkv_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    gate_limit: float | None = None
    embed_norm: Literal["none", "layer", "rms"] = "none"
    position_grid: int = 0
    position_sampling: Sampling = "bilinear_corners"
    window_size: int = 0
    full_attention_layers: tuple[int, ...] = ()
    deepstack_layers: tuple[int, ...] = ()
    rope_theta: float = 10000.0
    segments: Literal["frames", "clips"] = "frames"
    frame_positions: int = 0
    images_only: bool = False
    merger: Literal["mlp", "glm", "none", "mean"] = "mlp"
    merger_size: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.head_dim % 8:
            raise ValueError(
                f"EncoderSpec: hidden_size = {self.hidden_size} over num_heads = {self.num_heads} "
                "must give a head dim that is a multiple of 8 (16-byte rows of a head)"
            )
        if self.window_size > MAX_WINDOW_SIDE:
            raise ValueError(
                f"EncoderSpec: window_size = {self.window_size} patches is over the limit of "
                f"{MAX_WINDOW_SIDE}: the window kernel holds 256 patches"
            )
        if self.window_size % self.merge_size:
            raise ValueError(
                f"EncoderSpec: window_size = {self.window_size} patches is not a multiple of "
                f"merge_size = {self.merge_size}"
            )
        if self.window_size and (self.qk_norm or self.merger != "mlp"):
            what = "qk_norm" if self.qk_norm else f"merger = {self.merger!r}"
            raise ValueError(
                f"EncoderSpec: window_size = {self.window_size} together with {what} is not "
                "supported: window attention rotates q and k itself, and rows leave in the order "
                "of its windows"
            )
        if not self.rope_theta and (self.window_size or self.qk_norm):
            raise ValueError(
                f"EncoderSpec: rope_theta = {self.rope_theta} (no rope) together with window_size "
                f"= {self.window_size} and qk_norm = {self.qk_norm} is not supported: the kernels "
                "that rotate do these too"
            )
        if self.deepstack_layers and self.merger != "mlp":
            raise ValueError(
                f"EncoderSpec: deepstack_layers = {self.deepstack_layers} need merger = 'mlp', "
                "which each of them has a copy of"
            )
        if self.merger == "none" and (self.merge_size > 1 or self.out_size != self.hidden_size):
            raise ValueError(
                f"EncoderSpec: merge_size = {self.merge_size} and out_size = {self.out_size} with "
                f"merger = 'none': a token is a patch there, use 1 and {self.hidden_size}"
            )
        if self.merger == "mean" and self.out_size != self.hidden_size * self.patches_per_token:
            raise ValueError(
                f"EncoderSpec: out_size = {self.out_size} with merger = 'mean': a token is "
                f"{self.patches_per_token} patches side by side there, use "
                f"{self.hidden_size * self.patches_per_token}"
            )
        if self.window_size and self.segments == "clips":
            raise ValueError(
                f"EncoderSpec: window_size = {self.window_size} together with segments = 'clips' "
                "is not supported: windows are cut in frames"
            )
        if (self.merger == "glm") != (self.merger_size > 0):
            raise ValueError(
                f"EncoderSpec: merger_size = {self.merger_size} with merger = {self.merger!r}: the "
                "gated MLP of a 'glm' merger needs a width, and others have none"
            )
        if self.gate_limit is not None and not (self.mlp == "gated" and self.gate_limit > 0):
            raise ValueError(
                f"EncoderSpec: gate_limit = {self.gate_limit} must be positive, and needs mlp = "
                f"'gated', not {self.mlp!r}"
            )
        for name in ("full_attention_layers", "deepstack_layers"):
            bad = [i for i in getattr(self, name) if not 0 <= i < self.depth]
            if bad:
                raise ValueError(
                    f"EncoderSpec: {name} holds {bad}, outside the blocks 0..{self.depth - 1}"
                )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Values in a row of `pixel_values`."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patches_per_token(self) -> int:
        """Patches that the merger joins to a token."""
        return self.merge_size**2

    @property
    def pixel_block(self) -> int:
        """Patches along a side of the blocks that pixel rows come in; 1 is row by row."""
        return 1 if self.merger == "mean" else self.merge_size

    @property
    def has_final_norm(self) -> bool:
        """Whether the tower ends in a norm of the stream, its last hidden state."""
        return self.merger in ("none", "mean")

    @property
    def padded_mlp_size(self) -> int:
        """MLP width of the prepared weights.

        Rows that are not a multiple of 16 bytes keep the library GEMM from its fast kernels, so odd
        widths grow with zero weights to the next multiple of 128. act(0) * 0 = 0: the result is
        the same.
        """
        return self.mlp_size if self.mlp_size % 8 == 0 else -(-self.mlp_size // 128) * 128

    @property
    def rotates_neighbours(self) -> bool:
        """Whether rows of q and k are prepared so that a rotation's pairs are neighbours.

        Then the product that makes q and k can rotate them. Not where a norm of each head comes
        between, nor with windows, whose attention rotates halves by itself.
        """
        return bool(self.rope_theta) and not self.qk_norm and not self.window_size

    @property
    def defers_biases(self) -> bool:
        """Whether the residual stream leaves out biases that its readers add."""
        return self.proj_bias or self.mlp_bias

    @property
    def state_size(self) -> int:
        """Width of a row of the last hidden state: patches, or what a "glm" merger joined."""
        return self.out_size if self.merger == "glm" else self.hidden_size

    def num_tokens(self, t: int, h: int, w: int) -> int:
        """Merged tokens of an item of t frames of h x w patches."""
        return (1 if self.merger == "mean" else t) * h * w // self.patches_per_token

    def segment_size(self, t: int, h: int, w: int) -> int:
        """Patches of an attention segment of such an item, outside of windows."""
        return t * h * w if self.segments == "clips" else h * w

    def num_segments(self, t: int) -> int:
        """Attention segments of an item of t frames, outside of windows."""
        return 1 if self.segments == "clips" else t

    def clips(self, t: int, h: int, w: int) -> list[tuple[int, int, int]]:
        """An item of t frames as items of no more frames than have positions, rows in order."""
        most = self.frame_positions or t
        return [(min(most, t - first), h, w) for first in range(0, t, most)]

    def attends_in_windows(self, layer: int) -> bool:
        """Whether block `layer` attends inside windows and not over whole frames."""
        return self.window_size > 0 and layer not in self.full_attention_layers

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, for JSON."""
        return asdict(self)
