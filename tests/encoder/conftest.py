"""Tiny random towers and full models of every family, with weights that parity tests can trust.

transformers' default initialisation (std 0.02) is blind: without rope, a tiny tower's output
changes by 5.6e-6. `boost` scales weights by their fan-in and doubles queries and keys.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel
from vitgraph.encoder import forward, fp8, glm_merger, image_forward, stream
from vitgraph.kernels import rotary_linear
from vitgraph.kernels.bounded_fp8 import value_factors
from vitgraph.kernels.quantize import quantize_ref

IDS = {
    "image_token_id": 500,
    "video_token_id": 501,
    "vision_start_token_id": 502,
    "vision_end_token_id": 503,
}
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
TEXT_QWEN3 = TEXT | {
    "head_dim": 16,
    "rope_parameters": TEXT["rope_parameters"] | {"mrope_interleaved": True},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

QWEN3_VISION: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 96,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 2],
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 3, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64},
    "qwen2_5_vl": {
        "depth": 4,
        "hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 96,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1, 3],
        "window_size": 112,
    },
    "qwen3_vl": QWEN3_VISION,
    "qwen3_vl_moe": QWEN3_VISION,
}
TEXTS = {
    "qwen2_vl": TEXT,
    "qwen2_5_vl": TEXT,
    "qwen3_vl": TEXT_QWEN3,
    "qwen3_vl_moe": TEXT_QWEN3 | EXPERTS,
}
MODELS = {
    "qwen2_vl": (transformers.Qwen2VLForConditionalGeneration, transformers.Qwen2VLConfig),
    "qwen2_5_vl": (transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLConfig),
    "qwen3_vl": (transformers.Qwen3VLForConditionalGeneration, transformers.Qwen3VLConfig),
    "qwen3_vl_moe": (
        transformers.Qwen3VLMoeForConditionalGeneration,
        transformers.Qwen3VLMoeConfig,
    ),
}
TOWERS = {
    "qwen2_vl": Qwen2VisionTransformerPretrainedModel,
    "qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel,
    "qwen3_vl": Qwen3VLVisionModel,
    "qwen3_vl_moe": Qwen3VLMoeVisionModel,
}


def boost(module: torch.nn.Module) -> None:
    """Weights under which every part of a model shows in its output."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim < 2:
                p.add_(torch.randn_like(p) * 0.05)
                continue
            # a stack of experts [E, out, in] has the fan-in of one of them
            fan_in = p.shape[-1] if p.ndim <= 3 else p[0].numel()
            p.normal_(0, 0.3 if "pos_embed" in name else 1 / math.sqrt(fan_in))
            if name.endswith(("qkv.weight", "q_proj.weight", "k_proj.weight")):
                p.mul_(2)


@pytest.fixture(autouse=True)
def log_level_stays() -> Iterator[None]:
    """Commands set the level for their process, which here is that of all tests."""
    logger = logging.getLogger("vitgraph")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def build_tower() -> Callable[..., Any]:
    """`build_tower(family, dtype=torch.float32, seed=0, **config)`: boosted, in eval mode."""

    def build(
        family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
    ) -> Any:
        cls = TOWERS[family]
        torch.manual_seed(seed)
        tower = cls._from_config(cls.config_class(**VISION[family] | overrides))
        boost(tower)
        return tower.to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def build_model() -> Callable[..., Any]:
    """`build_model(family, seed=0)`: a boosted full model, fp32, in eval mode."""

    def build(family: str, seed: int = 0) -> Any:
        model_class, config_class = MODELS[family]
        torch.manual_seed(seed)
        model = model_class(
            config_class(text_config=TEXTS[family], vision_config=VISION[family], **IDS)
        )
        boost(model)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def pixel_rows() -> Callable[..., torch.Tensor]:
    """`pixel_rows(family, grids, seed=1)`: random pixel rows [T, P] for grids (t, h, w)."""

    def rows(family: str, grids: Any, seed: int = 1) -> torch.Tensor:
        patch = 14 if family.startswith("qwen2") else 16
        generator = torch.Generator().manual_seed(seed)
        count = sum(t * h * w for t, h, w in grids)
        return torch.randn(count, 3 * 2 * patch**2, generator=generator)

    return rows


@pytest.fixture(scope="session")
def model_inputs(pixel_rows: Callable[..., torch.Tensor]) -> Callable[..., dict[str, torch.Tensor]]:
    """`model_inputs(family, seed=1)`: a prompt with two images and a video of two frames."""

    def inputs(family: str, seed: int = 1) -> dict[str, torch.Tensor]:
        images, videos = [(1, 8, 12), (1, 4, 6)], [(2, 4, 8)]
        runs = [(502, 0, 1), (500, 1, 24), (503, 0, 1), (502, 0, 1), (500, 1, 6), (503, 0, 1)]
        if family.startswith("qwen3"):  # a run of tokens for each frame
            runs += [(502, 0, 1), (501, 2, 8), (503, 0, 1)] * 2
        else:
            runs += [(502, 0, 1), (501, 2, 16), (503, 0, 1)]
        runs += [(11, 0, 1), (12, 0, 1)]
        ids = torch.tensor([[token for token, _, count in runs for _ in range(count)]])
        kinds = torch.tensor([[kind for _, kind, count in runs for _ in range(count)]])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": kinds,
            "pixel_values": pixel_rows(family, images, seed),
            "image_grid_thw": torch.tensor(images),
            "pixel_values_videos": pixel_rows(family, videos, seed + 1),
            "video_grid_thw": torch.tensor(videos),
        }

    return inputs


class WatchedLock:
    """A lock that says when a thread has to wait for it."""

    def __init__(self, lock: Any, waits: threading.Event):
        self._lock, self._waits = lock, waits

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._waits.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[str], list[Any]]]:
    """`meet(handle, (owner, name), first, second)`: two threads meet in a swap.

    `second()` starts when `first()` has come into `owner.name`, which goes on when the second one
    waits for the lock of `handle`, has come into the same, or is through. Returns which of them
    have come in, and the two results.
    """

    def meeting(
        handle: Any, inside: tuple[Any, str], first: Callable[[], Any], second: Callable[[], Any]
    ) -> tuple[list[str], list[Any]]:
        owner, name = inside
        work, arrived = getattr(owner, name), threading.Event()
        entries, results = [], [None, None]

        def run_second() -> None:
            try:
                results[1] = second()
            finally:
                arrived.set()

        other = threading.Thread(target=run_second)

        def come_in(*args: Any) -> Any:
            if threading.current_thread() is other:
                entries.append("second")
                arrived.set()
            else:
                entries.append("first")
                if len(entries) == 1:
                    other.start()
                    arrived.wait()
            return work(*args)

        monkeypatch.setattr(owner, name, come_in)
        monkeypatch.setattr(handle, "_lock", WatchedLock(handle._lock, arrived))
        results[0] = first()
        other.join()
        return entries, results

    return meeting


class Products:
    """Stands in for the products of towers, and holds their operands to what writers promise.

    Rows past the live ones are zero where a norm or `quantize_rows` has quantised them, with the
    scale of a zero row, and where attention has written fp8, whose scales are 1. Those that an fp8
    product has written for the next one, `hidden`, and all others are finite.

    Attributes:
        tile: Rows of a tile. Products in fp8 write live rows rounded up to it and leave later ones
            alone, as the kernel of a GPU does; None lets them write all. Others write all.
        used: Addresses of the weights in fp8, one for each product.
        hidden: Largest magnitudes in live rows that a product has quantised.
        attended: Largest magnitudes of what attention has written in fp8.
    """

    def __init__(self) -> None:
        self.tile: int | None = None
        self.used: list[int] = []
        self.hidden: list[float] = []
        self.attended: list[float] = []
        self._written = 0  # address of the last rows that a product has quantised
        self._linear_fp8, self._linear = fp8.linear_fp8, forward.linear
        self._attention = forward.varlen_attention

    def linear_fp8(
        self, x, x_scale, weight, *arguments, live_rows, residual=None, out=None, **options
    ):
        live = int(live_rows)
        assert x.float().isfinite().all()
        assert x_scale.isfinite().all()
        assert (x_scale > 0).all()
        is_hidden, self._written = x.data_ptr() == self._written, 0
        if not is_hidden:
            assert not x[live:].view(torch.uint8).any()
            if (x_scale == 1).all():
                self.attended.append(x.float().abs().max().item())
            else:
                assert (x_scale[live:] < 1e-14).all()
        self.used.append(weight.data_ptr())
        y = residual if out is None else out
        kept = y.clone()
        self._linear_fp8(
            x, x_scale, weight, *arguments,
            live_rows=live_rows, residual=residual, out=out, **options,
        )  # fmt: skip
        self._leave(y, kept, live)
        if options.get("bound") is not None:
            self._written = y.data_ptr()
            self.hidden.append(y[:live].float().abs().max().item())
        return y

    def linear(self, x, *arguments, **options):
        # by the library, which reads and writes all rows
        assert x.isfinite().all()
        return self._linear(x, *arguments, **options)

    def attention(self, q, k, v, *arguments, **options):
        # a kernel reads up to a tile past the last segment
        for tensor in (q, k, v):
            assert tensor.isfinite().all()
        return self._attention(q, k, v, *arguments, **options)

    def _rows(self, total: int, live: int) -> int:
        return total if self.tile is None else min(total, -(-live // self.tile) * self.tile)

    def _leave(self, y: torch.Tensor, kept: torch.Tensor, live: int) -> None:
        rows = self._rows(len(y), live)
        y[rows:] = kept[rows:]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    """The `Products` of the test, in use."""
    watched = Products()
    for module in (fp8, stream):
        monkeypatch.setattr(module, "linear_fp8", watched.linear_fp8)
    for module in (forward, glm_merger, image_forward, stream, rotary_linear):
        monkeypatch.setattr(module, "linear", watched.linear)
    for module in (forward, image_forward):
        monkeypatch.setattr(module, "varlen_attention", watched.attention)
    return watched


@pytest.fixture
def fitted() -> Callable[..., Any]:
    """`fitted(norm weight, norm bias, qkv weight, qkv bias, proj weight)`: the block by definition.

    A `Fp8Block` of `qkv`, whose v has factors by `value_factors`, of its bias, and of `proj`, whose
    columns have their inverses.
    """

    def make(norm_weight, norm_bias, qkv, qkv_bias, proj):
        weight, scale = quantize_ref(qkv)
        first = 2 * len(qkv) // 3
        bias = None if qkv_bias is None else qkv_bias[first:]
        factors = value_factors(weight[first:], scale[first:], bias, norm_weight, norm_bias)
        every = torch.cat([torch.ones(first), factors])
        return fp8.Fp8Block(
            qkv=fp8.Fp8Layer(weight, scale * every),
            qkv_bias=None if qkv_bias is None else (qkv_bias * every).to(qkv_bias.dtype),
            proj=fp8.Fp8Layer(*quantize_ref(proj.float() / factors)),
            fits=True,
        )

    return make


@pytest.fixture(params=list(TOWERS))
def family(request: pytest.FixtureRequest) -> str:
    """Every supported family in turn."""
    return request.param


@pytest.fixture
def model(build_model, family):
    """A full model of `family`."""
    return build_model(family)


@pytest.fixture
def inputs(model_inputs, family):
    """Arguments of `model`."""
    return model_inputs(family)


@pytest.fixture
def call(pixel_rows):
    """`call(family="qwen3_vl", seed=1)`: arguments of a tower's forward, an image and a video."""
    grids = [(1, 8, 12), (2, 4, 6)]

    def arguments(family: str = "qwen3_vl", seed: int = 1):
        return pixel_rows(family, grids, seed), torch.tensor(grids)

    return arguments


@pytest.fixture
def qwen3(build_model):
    """A full model of the one family with everything but windows."""
    return build_model("qwen3_vl")
