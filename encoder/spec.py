"""What a tower is, as data: everything that kernels, weights and capture need to know of it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

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
        out_size: Width of a merged token.
        patch_size, temporal_patch_size, in_channels: Pixels, frames and channels of a patch.
        merge_size: Patches along a side of a merged token.
        norm: LayerNorm or RMSNorm, with `eps`.
        mlp: "plain" is fc2(act(fc1(x))), "gated" is down(act(gate(x)) * up(x)).
        activation: Activation of the MLP. The mergers use the exact (erf) GELU.
        patch_bias: Whether the patch embedding has a bias.
        position_grid: Side of the learned position table, 0 for none.
        window_size: Patches along a side of an attention window, 0 for none.
        full_attention_layers: Blocks that attend over whole frames in a tower with windows.
        deepstack_layers: Blocks after which a deepstack merger reads the stream.
        rope_theta: Base of the axial rotary embedding.
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
    position_grid: int = 0
    window_size: int = 0
    full_attention_layers: tuple[int, ...] = ()
    deepstack_layers: tuple[int, ...] = ()
    rope_theta: float = 10000.0

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
    def padded_mlp_size(self) -> int:
        """MLP width of the prepared weights.

        Rows that are not a multiple of 16 bytes keep the library GEMM from its fast kernels, so odd
        widths grow with zero weights to the next multiple of 128. act(0) * 0 = 0: the result is
        the same.
        """
        return self.mlp_size if self.mlp_size % 8 == 0 else -(-self.mlp_size // 128) * 128

    def attends_in_windows(self, layer: int) -> bool:
        """Whether block `layer` attends inside windows and not over whole frames."""
        return self.window_size > 0 and layer not in self.full_attention_layers

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, for JSON."""
        return asdict(self)
