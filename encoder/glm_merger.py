"""The merger of GLM's towers: a convolution joins 2 x 2 patches, an MLP with a gate follows.

    joined = join(norm(x))                         [T/4, out], the tower's last hidden state
    y = gelu(layer_norm(proj(joined)))
    pooled = down(silu(gate(y)) * up(y))

The convolution's stride is its kernel, and the patches of a token lie side by side, so `join` is a
linear layer on rows of four patches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch

from ..kernels.activation import activation_
from ..kernels.gated_linear import gated_linear
from ..kernels.layout import Layout
from ..kernels.linear import linear
from ..kernels.norm import norm
from ..kernels.swiglu import swiglu
from ..kernels.zero_padding import zero_padding_
from .spec import EncoderSpec
from .stream import NormWeights, Stream
from .weight_map import Rule
from .weight_map import linear as linear_rules
from .weight_map import norm as norm_rules

POST_NORM_EPS = 1e-5  # torch's default, which no config changes


@dataclass(frozen=True)
class GlmMergerWeights:
    """Its tensors; of the first norm with what the stream lacks before it."""

    norm: NormWeights
    join_weight: torch.Tensor
    join_bias: torch.Tensor
    proj_weight: torch.Tensor
    post_norm_weight: torch.Tensor
    post_norm_bias: torch.Tensor
    up_weight: torch.Tensor
    down_weight: torch.Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], offset: torch.Tensor | None) -> Self:
        """From prepared tensors, by our names."""
        return cls(
            norm=(tensors["merger.norm.weight"], None, offset),
            join_weight=tensors["merger.join.weight"],
            join_bias=tensors["merger.join.bias"],
            proj_weight=tensors["merger.proj.weight"],
            post_norm_weight=tensors["merger.post_norm.weight"],
            post_norm_bias=tensors["merger.post_norm.bias"],
            up_weight=tensors["merger.up.weight"],
            down_weight=tensors["merger.down.weight"],
        )


def glm_merger_rules(s: EncoderSpec) -> list[Rule]:
    """Rules of its tensors, by the names of transformers' GLM towers."""
    out, m = s.out_size, s.merge_size
    gate_up = ("merger.gate_proj.weight", "merger.up_proj.weight")
    return [
        *norm_rules("merger.norm", "post_layernorm", s.hidden_size, "rms"),
        # [out, channel, row, column] to the order of joined rows: patch by patch, channels inside
        Rule(
            "merger.join.weight", ("downsample.weight",), (out, s.hidden_size, m, m),
            axes=(0, 2, 3, 1),
        ),
        Rule("merger.join.bias", ("downsample.bias",), (out,)),
        *linear_rules("merger.proj", "merger.proj", out, out, bias=False),
        *norm_rules("merger.post_norm", "merger.post_projection_norm", out, "layer"),
        Rule("merger.up.weight", gate_up, (s.merger_size, out)),
        *linear_rules("merger.down", "merger.down_proj", out, s.merger_size, bias=False),
    ]  # fmt: skip


def glm_merge(
    spec: EncoderSpec,
    weights: GlmMergerWeights,
    stream: Stream,
    plan: Layout,
    joined: torch.Tensor,
    pooled: torch.Tensor,
) -> None:
    """Write `joined` and `pooled` [T/4, out] for the residual stream.

    Rows past the live ones are those of zeros, or as they were where a large matrix product leaves
    them alone.
    """
    live = plan.live_tokens
    normed = stream.norm(weights.norm, spec)
    rows = normed.view(-1, spec.hidden_size * spec.patches_per_token)
    linear(rows, weights.join_weight, weights.join_bias, out=joined, live_rows=live)
    # a new tensor may hold anything past the live rows: the norm does not read it there
    y = linear(joined, weights.proj_weight, live_rows=live)
    norm(
        y, weights.post_norm_weight, weights.post_norm_bias, POST_NORM_EPS,
        kind="layer", live_rows=live, out=y,
    )  # fmt: skip
    activation_(y, "gelu_erf", live)
    # gating leaves rows past the live ones alone, and the product after it may read them
    gated = zero_padding_(y.new_empty(len(y), spec.merger_size), live)
    if spec.gate_limit is None:
        gated_linear(y, weights.up_weight, out=gated, live_rows=live)
    else:
        swiglu(linear(y, weights.up_weight, live_rows=live), gated, live, spec.gate_limit)
    linear(gated, weights.down_weight, out=pooled, live_rows=live)
