"""The tower of Step3 in plain PyTorch modules: what ours is held against, and timed beside.

transformers has no class for it. This one does what the tower is described to do, by the modules
that anybody would take (`Conv2d`, `Linear`, `LayerNorm`, `scaled_dot_product_attention`), and has
the names of the published checkpoint. It is nobody's implementation but ours.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..encoder.image_spec import ImageTowerSpec
from .towers_config import boost_


class _Embeddings(nn.Module):
    """Patches with their positions, behind copies of the class row with its own."""

    def __init__(self, spec: ImageTowerSpec):
        super().__init__()
        D, P = spec.hidden_size, spec.patch_size
        self.side, self.class_rows = spec.position_grid, spec.class_rows
        self.class_embedding = nn.Parameter(torch.empty(1, D))
        self.patch_embedding = nn.Conv2d(spec.in_channels, D, P, P, bias=spec.patch_bias)
        self.position_embedding = nn.Embedding(self.side**2 + 1, D)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(images)
        table, grid = self.position_embedding.weight, patches.shape[2:]
        places = table[1:].T.view(1, -1, self.side, self.side)
        if grid != places.shape[2:]:
            # resized in fp32 and rounded once: a loss that the tower need not have
            places = F.interpolate(
                places.float(), grid, mode="bicubic", antialias=True, align_corners=False
            ).to(table.dtype)
        x = (patches + places).flatten(2).mT
        first = (self.class_embedding + table[:1]).expand(len(x), self.class_rows, -1)
        return torch.cat([first, x], 1)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class _Layer(nn.Module):
    """Post-norm: what a branch computes is normalised, and the stream that it reads is not."""

    def __init__(self, spec: ImageTowerSpec):
        super().__init__()
        D = spec.hidden_size
        self.self_attn = _Attention(D, spec.num_heads)
        self.layer_norm1 = nn.LayerNorm(D, spec.eps)
        self.mlp = _Mlp(D, spec.mlp_size)
        self.layer_norm2 = nn.LayerNorm(D, spec.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.layer_norm1(self.self_attn(x))
        return x + self.layer_norm2(self.mlp(x))


class _Transformer(nn.Module):
    def __init__(self, spec: ImageTowerSpec):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(spec) for _ in range(spec.depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _VisionModel(nn.Module):
    def __init__(self, spec: ImageTowerSpec):
        super().__init__()
        self.embeddings = _Embeddings(spec)
        self.transformer = _Transformer(spec)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.transformer(self.embeddings(images))


class Step3Plain(nn.Module):
    """Tower, convolutions and projector: images [N, C, H, W] to tokens [N, tokens, out_size].

    Args:
        spec: Of family "step3_vl". Parameters are not initialised in a useful way; see
            `boost_step3_`.
    """

    def __init__(self, spec: ImageTowerSpec):
        super().__init__()
        first, second = spec.downsamples
        self.patch_size, self.class_rows = spec.patch_size, spec.class_rows
        self.vision_model = _VisionModel(spec)
        self.vit_downsampler = nn.Conv2d(
            spec.hidden_size, first.width, first.kernel, first.stride, first.padding
        )
        self.vit_downsampler2 = nn.Conv2d(
            first.width, second.width, second.kernel, second.stride, second.padding
        )
        self.vit_large_projector = nn.Linear(second.width, spec.out_size, bias=spec.projector_bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Projected tokens; nothing is read on the host."""
        grid = [side // self.patch_size for side in images.shape[2:]]
        x = self.vision_model(images)[:, self.class_rows :].mT.unflatten(2, grid)
        x = self.vit_downsampler2(self.vit_downsampler(x)).flatten(2).mT
        return self.vit_large_projector(x)


@torch.no_grad()
def boost_step3_(tower: Step3Plain, seed: int) -> Step3Plain:
    """`boost_`, with what post-norm blocks need so that rounding stays small beside mistakes.

    The norms behind the branches scale them, so they get a fifth of their weights, in the range of
    the layer scales of `boost_`. By whole ones the stream grows with every block, and queries and
    keys, which no norm has scaled, with it: attention then picks single patches, and after 63
    blocks rounding to bf16 changes the output as much as averaging over all patches does. Queries
    and keys are not doubled, for the same reason. The class row is as large as the positions, so
    that it shows.
    """
    boost_(tower, seed)
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.mul_(0.2)
            module.bias.mul_(0.2)
    row = tower.vision_model.embeddings.class_embedding
    row.mul_(0.3 * row.numel() ** 0.5)  # by its fan-in before
    return tower


def plain_tower(spec: ImageTowerSpec, device: torch.device, dtype: torch.dtype) -> Step3Plain:
    """The tower on `device` in `dtype`, its parameters not yet written."""
    from transformers.initialization import no_init_weights

    with torch.device(device), no_init_weights():
        tower = Step3Plain(spec)
    return tower.to(dtype).eval().requires_grad_(False)
