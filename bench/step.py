"""The tower of Step-3.7 and its projector, on whole images and crops, against Hugging Face's.

- `hf-eager-sdpa`: the model's own `get_image_features`, on SDPA.
- `hf-exact-graph`: its modules with angles computed beforehand (its forward reads the grid on the
  host) as one CUDA graph of exactly this batch, replayed; no server could keep one for each.
- `ours-eager`: `StepEncoder` launch by launch.
- `ours`: the whole call of a captured `StepEncoder`: staging, replays, joining.

Step3 is not in transformers, so there is nothing to measure it against. A contender whose error
against fp32 exceeds 1.3 times that of `hf-eager-sdpa` gets no time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..encoder.step_encoder import LOCAL_SIZE, StepEncoder
from ..encoder.step_spec import StepSpec
from ..encoder.step_swap import rope_axes_of
from ..encoder.step_tower import live_tensors, live_weights
from ..kernels.testing import rel_rms
from .step_config import STEP_TOWERS
from .timing import Effort, TimeBudget, record, time_calls
from .towers_config import boost_

TOWER = "step-3.7"
PROVIDERS = ("hf-eager-sdpa", "hf-exact-graph", "ours-eager", "ours")
# crops of each image
WORKLOADS: dict[str, tuple[int, ...]] = {
    "1whole": (0,),
    "1whole+6": (6,),
    "4whole": (0, 0, 0, 0),
    "4whole+10": (6, 0, 4, 0),
    "8whole+24": (6, 0, 4, 0, 8, 2, 4, 0),
}
MAX_ERROR = 1.3  # times that of the baseline


class _Contest:
    """Hugging Face's tower in the dtype and in fp32, and ours, on one device."""

    def __init__(self, spec: StepSpec, device: torch.device, dtype: torch.dtype, seed: int):
        self.tower, self.projector = _hf_modules(spec, device, dtype)
        # compared with what transformers computes, so its order of axes counts
        spec = replace(spec, rope_axes=rope_axes_of(self.tower))
        self.spec, self.device, self.dtype = spec, device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)
        boost_(self.tower, seed)
        boost_(self.projector, seed + 1)
        with torch.no_grad():
            for name, parameter in self.tower.named_parameters():
                if "lambda" in name:  # a layer scale, which the boost takes for a bias
                    parameter.uniform_(0.1, 0.3, generator=self.generator)
        self.exact = _hf_modules(spec, device, torch.float32)
        for wide, half in zip(self.exact, (self.tower, self.projector), strict=True):
            wide.load_state_dict(half.state_dict())
        tensors = live_tensors(self.tower, self.projector)
        weights = live_weights(spec, tensors)
        self.encoder = StepEncoder(spec, weights, local_size=min(LOCAL_SIZE, spec.image_size))

    def images(self, counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Whole images and crops, in the dtype and on the device."""

        def draw(count: int, path: str) -> torch.Tensor:
            size = self.encoder.paths[path].size
            shape = count, self.spec.in_channels, size.height, size.width
            pixels = torch.randn(shape, device=self.device, generator=self.generator)
            return pixels.to(self.dtype)

        return draw(len(counts), "global"), draw(sum(counts), "local") if sum(counts) else None

    def hf(
        self, modules: Sequence[Any], wholes: torch.Tensor, crops: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Projected tokens of the whole images, and of the crops if there are any."""
        tower, projector = modules
        batches = [x.to(projector.weight.dtype) for x in (wholes, crops) if x is not None]
        return [projector(tower(x).last_hidden_state) for x in batches]

    def hf_without_host(
        self, wholes: torch.Tensor, crops: torch.Tensor | None
    ) -> Callable[[], list[torch.Tensor]]:
        """`hf` of the tower in the dtype, by its modules, with nothing left for the host."""
        tower, batches = self.tower, [x for x in (wholes, crops) if x is not None]
        grids = [tuple(side // self.spec.patch_size for side in x.shape[2:]) for x in batches]
        places = [torch.cartesian_prod(*map(torch.arange, grid)) for grid in grids]
        angles = [tower.rotary_emb(batches[0], p.to(self.device)) for p in places]

        def run() -> list[torch.Tensor]:
            features = []
            for images, grid, angle in zip(batches, grids, angles, strict=True):
                x = tower.embeddings(images, interpolate_pos_encoding=True)
                x = tower.pre_layernorm(x)
                for layer in tower.layers:
                    x = layer(x, position_embeddings=angle)
                x = x.mT.reshape(len(x), -1, *grid)
                x = tower.downsampler2(tower.downsampler1(x)).flatten(2).mT
                features.append(self.projector(x))
            return features

        return run

    def ours(
        self, wholes: torch.Tensor, crops: torch.Tensor | None, counts: Sequence[int]
    ) -> list[torch.Tensor]:
        """The call of a user: features by image."""
        return self.encoder(wholes, crops, counts, check_finite=False).pooler_output


def _hf_modules(spec: StepSpec, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tower and projector of transformers, their parameters not yet written, as released."""
    from transformers.initialization import no_init_weights
    from transformers.models.step3p7 import modeling_step3p7

    cls: Any = modeling_step3p7.Step3p7VisionModel
    config = cls.config_class(
        hidden_size=spec.hidden_size, num_hidden_layers=spec.depth,
        num_attention_heads=spec.num_heads, image_size=spec.image_size,
        mlp_ratio=spec.mlp_size / spec.hidden_size,
    )  # fmt: skip
    with torch.device(device), no_init_weights():
        tower = cls._from_config(config, dtype=dtype, attn_implementation="sdpa")
        projector = torch.nn.Linear(spec.state_size, spec.out_size, bias=False, dtype=dtype)
    return tower.eval().requires_grad_(False), projector.requires_grad_(False)


def _parts(
    features: Sequence[torch.Tensor], counts: Sequence[int], per_crop: int
) -> list[torch.Tensor]:
    """Our features as Hugging Face's two calls give them: of whole images, and of crops."""
    wholes = torch.stack([f[n * per_crop :] for f, n in zip(features, counts, strict=True)])
    if not sum(counts):
        return [wholes]
    crops = [f[: n * per_crop] for f, n in zip(features, counts, strict=True)]
    return [wholes, torch.cat(crops).view(sum(counts), per_crop, -1)]


@torch.no_grad()
def run(
    workloads: Mapping[str, Sequence[int]],
    providers: Sequence[str] = PROVIDERS,
    *,
    spec: StepSpec | None = None,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    effort: Effort,
    seed: int = 0,
    time_budget: TimeBudget,
) -> list[dict[str, Any]]:
    """A row for each workload and provider: `ms` (median), `p20`, `p80`, and `error`, the worst
    part's error over that of `hf-eager-sdpa`; a provider that is too inexact has `reason` instead.

    Without a GPU, `hf-exact-graph` is left out and `ours` is not captured.

    Raises:
        ValueError: an unknown provider.
    """
    if unknown := sorted(set(providers) - set(PROVIDERS)):
        raise ValueError(
            f"bench: provider {', '.join(unknown)} is not known; use {', '.join(PROVIDERS)}"
        )
    contest = _Contest(spec or STEP_TOWERS[TOWER], device, dtype, seed)
    is_cuda = device.type == "cuda"
    synchronize = torch.cuda.synchronize if is_cuda else _nothing
    modules = (contest.tower, contest.projector)
    rows: list[dict[str, Any]] = []
    for name, counts in workloads.items():
        if not time_budget.allows(name):
            continue
        wholes, crops = contest.images(counts)
        exact = contest.hf(contest.exact, wholes, crops)
        eager = contest.hf(modules, wholes, crops)
        base = [rel_rms(e, o) for e, o in zip(eager, exact, strict=True)]
        calls: dict[str, Callable[[], Any]] = {}
        results: dict[str, list[torch.Tensor]] = {}
        per_crop = contest.encoder.paths["local"].size.tokens

        def ours(w: Any = wholes, c: Any = crops, n: Any = tuple(counts)) -> Any:
            return contest.ours(w, c, n)

        if "hf-eager-sdpa" in providers:
            calls["hf-eager-sdpa"] = lambda w=wholes, c=crops: contest.hf(modules, w, c)
            results["hf-eager-sdpa"] = eager
        if "hf-exact-graph" in providers and is_cuda:
            graph, results["hf-exact-graph"] = record(contest.hf_without_host(wholes, crops))
            graph.replay()
            calls["hf-exact-graph"] = graph.replay
        timings = {}
        if "ours-eager" in providers:
            contest.encoder.release_graphs()
            results["ours-eager"] = _parts(ours(), counts, per_crop)
            timings |= time_calls({"ours-eager": ours}, synchronize, effort)
        if "ours" in providers:
            if is_cuda and contest.encoder.graphs is None:
                contest.encoder.capture()
            results["ours"] = _parts(ours(), counts, per_crop)
            calls["ours"] = ours
        timings |= time_calls(calls, synchronize, effort)
        for provider, parts in results.items():
            errors = [rel_rms(p, o) for p, o in zip(parts, exact, strict=True)]
            error = max(e / b for e, b in zip(errors, base, strict=True))
            row: dict[str, Any] = {"tower": TOWER, "workload": name, "provider": provider}
            row |= {"images": len(counts), "crops": sum(counts), "error": error}
            if error > MAX_ERROR:
                row["reason"] = f"error {error:.2f} times that of hf-eager-sdpa"
            else:
                timing = timings[provider]
                row |= {"ms": timing.ms, "p20": timing.p20, "p80": timing.p80}
            rows.append(row)
    return rows


def _nothing() -> None:
    """There is nothing to wait for on a CPU."""


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for the eye."""
    lines = [f"{'workload':12} {'provider':16} {'ms':>9} {'error':>6}"]
    for row in rows:
        ms = f"{row['ms']:9.3f}" if "ms" in row else f"{'-':>9}"
        lines.append(f"{row['workload']:12} {row['provider']:16} {ms} {row['error']:6.2f}")
    return "\n".join(lines)
