"""The least time a workload can take on this GPU with the kernels it has.

    floor = library GEMMs at exact shapes + best attention + norm passes + 1 us for each kernel
            that is in none of these

The first three are measured in the same run, inside CUDA graphs, with bf16 and weights out of L2
(as they are in a tower of 1 GB). A GEMM counts with the fastest of the library's algorithms. A time
taken inside a graph includes the gap before the kernel, so only kernels without a time of their own
are charged the microsecond. What a perfect tower fuses away is left out: rotary embedding (into the
qkv GEMM or the attention), activations, residual adds, position embedding, row permutations. Window
attention is taken at its traffic, q, k and v in and the output out.

The counting part is plain Python; `FloorMeter` measures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels.attention import BACKENDS, check_backend, varlen_attention
from ..kernels.cublaslt import Algorithm, multiply, product_of
from .timing import Effort, record_each, time_graphs
from .towers_config import patch_values
from .tune_library import fastest, proposed
from .workloads import Grid, num_patches

GAP_MS = 1.0e-3  # of a kernel in a graph, measured on an H200
_REPEATS = 8  # calls in a graph: each GEMM meets weights that L2 has dropped since the last time
# fewer rounds where one takes long: attention grows with the square of an image
_EFFORT = Effort(warmup_s=0.005, rounds=7, min_rounds=3, limit_s=3.0)


@dataclass(frozen=True)
class TowerShape:
    """The dimensions that decide what a tower costs.

    Attributes:
        hidden, heads, depth, mlp: D, H, blocks and MLP width (one half of it when gated).
        patch_values: Values in a row of pixels.
        out: Width of a merged token.
        merge: Patches in a merged token.
        num_mergers: The last one and the deepstack ones; 0 for a tower that ends in a norm.
        full_layers: Blocks with attention over whole frames; the others use windows.
        merger_mlp: Width of the gated MLP of GLM's merger, 0 for other mergers.
    """

    hidden: int
    heads: int
    depth: int
    mlp: int
    is_gated: bool
    patch_values: int
    out: int
    merge: int
    num_mergers: int
    full_layers: int
    merger_mlp: int = 0

    @classmethod
    def of(cls, config: Any) -> "TowerShape":
        """Read a Hugging Face vision configuration of a family in `towers_config`."""
        if config.model_type in ("paddleocr_vl_vision", "kimi_k25_vision"):
            joined = 1 if config.model_type == "paddleocr_vl_vision" else 4
            return cls(
                hidden=config.hidden_size,
                heads=config.num_attention_heads,
                depth=config.num_hidden_layers,
                mlp=config.intermediate_size,
                is_gated=False,
                patch_values=patch_values(config),
                out=config.hidden_size * joined,
                merge=joined,
                num_mergers=0,
                full_layers=config.num_hidden_layers,
            )
        is_qwen2 = hasattr(config, "embed_dim")
        hidden = config.embed_dim if is_qwen2 else config.hidden_size
        full = getattr(config, "fullatt_block_indexes", None)
        mlp = hidden * config.mlp_ratio if is_qwen2 else config.intermediate_size
        merger_mlp = 0
        if config.model_type == "glm4v_vision":
            mlp, merger_mlp = config.out_hidden_size, mlp
        elif config.model_type == "glm_ocr_vision":
            merger_mlp = config.out_hidden_size * config.in_channels
        elif config.model_type == "glm5_next_vision":
            merger_mlp = config.projection_intermediate_size
        return cls(
            hidden=hidden,
            heads=config.num_heads,
            depth=config.depth,
            mlp=mlp,
            is_gated=full is not None or merger_mlp > 0,
            patch_values=patch_values(config),
            out=config.hidden_size if is_qwen2 else config.out_hidden_size,
            merge=config.spatial_merge_size**2,
            num_mergers=1 + len(getattr(config, "deepstack_visual_indexes", ())),
            full_layers=config.depth if full is None else len(full),
            merger_mlp=merger_mlp,
        )


@dataclass(frozen=True)
class Gemm:
    """`count` products x [M, K] @ weight [N, K]^T, timed with a bias."""

    name: str
    M: int
    N: int
    K: int
    count: int

    @property
    def flops(self) -> int:
        """Of all `count` products."""
        return 2 * self.M * self.N * self.K * self.count

    @property
    def weight_bytes(self) -> int:
        """bf16 weights of all `count` products."""
        return 2 * self.N * self.K * self.count


def aligned(width: int, multiple: int = 16) -> int:
    """`width` as library GEMMs want it: rows of bf16 in whole multiples of 32 bytes."""
    return -(-width // multiple) * multiple


def gemms(shape: TowerShape, patches: int, alignment: int = 16) -> list[Gemm]:
    """Every GEMM of one forward of `patches` patches; an odd MLP width is padded with zeros."""
    D, mlp, joined = shape.hidden, aligned(shape.mlp, alignment), shape.hidden * shape.merge
    up = 2 * mlp if shape.is_gated else mlp
    tokens, out = patches // shape.merge, shape.out
    merger = [
        Gemm("merger_fc1", tokens, joined, joined, shape.num_mergers),
        Gemm("merger_fc2", tokens, out, joined, shape.num_mergers),
    ]
    if shape.merger_mlp:
        merger = [
            Gemm("merger_join", tokens, out, joined, 1),
            Gemm("merger_proj", tokens, out, out, 1),
            Gemm("merger_up", tokens, 2 * shape.merger_mlp, out, 1),
            Gemm("merger_down", tokens, out, shape.merger_mlp, 1),
        ]
    return [
        Gemm("patch_embed", patches, D, shape.patch_values, 1),
        Gemm("qkv", patches, 3 * D, D, shape.depth),
        Gemm("proj", patches, D, D, shape.depth),
        Gemm("up", patches, up, D, shape.depth),
        Gemm("down", patches, D, mlp, shape.depth),
        *(merger if shape.num_mergers else []),
    ]


def num_kernels(shape: TowerShape) -> int:
    """Kernels of a perfect forward.

    Two norms, four GEMMs and attention a block; norm, two GEMMs and a gather for each merger, or
    two norms and four GEMMs for GLM's, or a norm without mergers; patch embedding and layout.
    """
    if shape.merger_mlp:
        return 7 * shape.depth + 8
    if not shape.num_mergers:
        return 7 * shape.depth + 3
    return 7 * shape.depth + 4 * shape.num_mergers + 2


def num_untimed_kernels(shape: TowerShape) -> int:
    """Kernels among `num_kernels` that no measured time covers: merger gathers and the layout.

    And the norm of GLM's merged tokens.
    """
    return shape.num_mergers + 1


def segment_lengths(grids: Sequence[Grid]) -> tuple[int, ...]:
    """Rows of every frame: the segments of full attention."""
    return tuple(h * w for t, h, w in grids for _ in range(t))


@dataclass(frozen=True)
class Floor:
    """The floor of one workload by part, in ms, and the attention backend that was fastest."""

    gemm_ms: float
    attention_ms: float
    norm_ms: float
    gap_ms: float
    backend: str

    @property
    def ms(self) -> float:
        """The whole floor."""
        return self.gemm_ms + self.attention_ms + self.norm_ms + self.gap_ms


@dataclass
class FloorMeter:
    """Measures floors on a CUDA device; what workloads share is measured once."""

    device: torch.device
    _known: dict[tuple, Any] = field(default_factory=dict)

    def floor(self, shape: TowerShape, grids: Sequence[Grid]) -> Floor:
        """Measure the floor of `grids` on a tower of `shape`."""
        patches, lengths = num_patches(grids), segment_lengths(grids)
        # of two paddings of an odd width the faster counts: 3420 as 3424 or as 3456
        gemm_ms = min(
            sum(g.count * self._gemm(g.M, g.N, g.K) for g in gemms(shape, patches, alignment))
            for alignment in ((16,) if shape.mlp % 16 == 0 else (16, 128))
        )
        full_ms, backend = self._attention(lengths, shape.heads, shape.hidden // shape.heads)
        # q, k and v in and the output out are the traffic of copying two streams
        window_ms = self._copy(2 * patches, shape.hidden)
        windows = shape.depth - shape.full_layers
        num_norms = 2 * shape.depth + max(1, shape.num_mergers)  # at least one behind the blocks
        return Floor(
            gemm_ms=gemm_ms,
            attention_ms=shape.full_layers * full_ms + windows * window_ms,
            norm_ms=num_norms * self._copy(patches, shape.hidden),
            gap_ms=GAP_MS * num_untimed_kernels(shape),
            backend=backend,
        )

    def _once(self, key: tuple, measure: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def _gemm(self, M: int, N: int, K: int) -> float:
        def measure() -> float:
            x, bias, y = self._random(M, K), self._random(N), self._random(M, N)
            weights = [self._random(N, K) for _ in range(_REPEATS)]
            own_choice = [partial(F.linear, x, w, bias) for w in weights]
            product = product_of(x, weights[0], bias, y, "")
            if product is None:
                return _time(own_choice)

            def calls_of(algorithm: Algorithm) -> list[Callable[[], bool]]:
                return [partial(multiply, product, algorithm, x, w, bias, y) for w in weights]

            quick = fastest(proposed(product), calls_of)
            return min(map(_time, [own_choice, *map(calls_of, quick)]))

        return self._once(("gemm", M, N, K), measure)

    def _copy(self, rows: int, width: int) -> float:
        def measure() -> float:
            source = self._random(rows, width)
            target = torch.empty_like(source)
            return _time([partial(target.copy_, source)] * _REPEATS)

        return self._once(("copy", rows, width), measure)

    def _attention(self, lengths: tuple[int, ...], H: int, D: int) -> tuple[float, str]:
        def measure() -> tuple[float, str]:
            timed = attention_times(lengths, H, D, self.device)
            if not timed:
                raise RuntimeError(f"floor: no attention backend runs on {self.device}")
            return min((ms, name) for name, ms in timed.items())

        return self._once(("attention", lengths, H, D), measure)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)


def attention_times(
    lengths: Sequence[int], H: int, D: int, device: torch.device
) -> dict[str, float]:
    """ms of each attention backend that runs here and can be captured, in bf16, by name."""
    rows = sum(lengths)
    qkv = torch.randn(rows, 3, H, D, device=device, dtype=torch.bfloat16)
    out = torch.zeros(rows, H, D, device=device, dtype=torch.bfloat16)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    times: dict[str, float] = {}
    for name in BACKENDS:
        if name == "reference":
            continue
        try:
            check_backend(name, torch.bfloat16, device, D)
        except ValueError:
            continue  # not installed or not for this device: no contender
        call = partial(
            varlen_attention, *qkv.unbind(1), ends,
            max_seqlen=max(lengths), scale=D**-0.5, out=out, backend=name,
        )  # fmt: skip
        times[name] = _time([call] * 4)
    return times


def _time(works: Sequence[Callable[[], object]]) -> float:
    with torch.inference_mode():
        return time_graphs({"it": record_each(works)}, _EFFORT)["it"].ms
