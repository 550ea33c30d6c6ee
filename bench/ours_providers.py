"""This package's encoder as three contenders.

- `ours-eager`: its kernels launched one by one on the exact layout.
- `ours-graph`: replays of the rungs that the batch needs, nothing else.
- `ours`: the call a user makes after `capture`: packing, staging, replay and copies out.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from ..capture import (
    AssumedCosts,
    Batch,
    EncoderCudaGraphConfig,
    EncoderCudaGraphManager,
    RungLimits,
    plan,
)
from ..capture.captured import ONLY_VARIANT
from ..encoder.families import FAMILIES
from ..encoder.spec import EncoderSpec
from ..encoder.vision_encoder import VisionEncoder, place_of_live
from ..encoder.weights import TowerWeights
from ..kernels.attention import check_backend
from .floor import TowerShape
from .provider import Builders, Job, Provider, UnavailableError, features_of, require_cuda
from .workloads import Grid

Budgets = Literal["auto", "ladder", "tight"]
PLAIN = "plain"
_OWN_BACKENDS = ("hopper", "triton")  # as an encoder prefers them


def plain_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What an encoder on `device` chooses where no package of FlashAttention is installed.

    Raises:
        ValueError: no kernel of ours takes the dtype or head dim.
    """
    if device.type != "cuda":
        return "reference"
    for name in _OWN_BACKENDS[:-1]:
        try:
            check_backend(name, dtype, device, head_dim)
        except ValueError:
            continue  # not for this device, dtype or head dim
        return name
    check_backend(_OWN_BACKENDS[-1], dtype, device, head_dim)
    return _OWN_BACKENDS[-1]


def encoder_of(
    tower: torch.nn.Module, spec: EncoderSpec | None = None, **options: Any
) -> VisionEncoder:
    """Our encoder with the weights of a live Hugging Face tower.

    Args:
        tower: On its device, in its dtype.
        spec: As `TowerConfig.spec`.
        options: `attention` and `precision`, as `VisionEncoder.from_hf` has them.
    """
    if spec is None:
        return VisionEncoder.from_hf(tower, **options)
    state = dict(tower.named_parameters())
    rules = FAMILIES[spec.family].weight_map(spec)
    weights = TowerWeights(spec, rules, state, *place_of_live(state))
    return VisionEncoder(spec, weights, **options)


class OursTower:
    """The encoder of one tower and its graphs, made when they are first needed.

    Args:
        tower: Live Hugging Face tower.
        workloads: All that will be asked of it; decides which graphs are captured.
        budgets: "auto" captures the rungs of the automatic ladder that the workloads use (the
            same rungs, sooner), "ladder" all of it, "tight" one rung of exactly each workload,
            and numbers are the rungs themselves, in tokens.
        attention: Backend for attention over whole frames; None for the encoder's choice, `PLAIN`
            for the one it makes without packages.
        precision: Of the linear layers; see `VisionEncoder.from_pretrained`.
        spec: As `TowerConfig.spec`.
    """

    def __init__(
        self,
        tower: torch.nn.Module,
        workloads: Sequence[Sequence[Grid]],
        budgets: Budgets | tuple[int, ...] = "auto",
        attention: str | None = None,
        precision: str = "native",
        spec: EncoderSpec | None = None,
    ):
        self._tower = tower
        self._workloads = workloads
        self._budgets = budgets
        self._attention = attention
        self._precision = precision
        self._spec = spec
        self._encoder: VisionEncoder | None = None

    def builders(self) -> Builders:
        """Builders of the three contenders."""
        return {"ours-eager": self._eager, "ours-graph": self._graph, "ours": self._call}

    def encoder(self) -> VisionEncoder:
        """The encoder, built on first use from the tower's weights."""
        if self._encoder is None:
            attention = self._attention
            if attention == PLAIN:
                parameter = next(self._tower.parameters())
                shape = TowerShape.of(self._tower.config)
                head_dim = shape.hidden // shape.heads
                attention = plain_backend(parameter.device, parameter.dtype, head_dim)
            self._encoder = encoder_of(
                self._tower, self._spec, attention=attention, precision=self._precision
            )
        return self._encoder

    def config(self) -> EncoderCudaGraphConfig:
        """Which graphs `capture` will record."""
        if self._budgets == "ladder":
            return EncoderCudaGraphConfig()
        if isinstance(self._budgets, tuple):
            return EncoderCudaGraphConfig(token_budgets=self._budgets)
        encoder = self.encoder()
        items = [encoder.item_specs(list(grids)) for grids in self._workloads]
        if self._budgets == "tight":
            return EncoderCudaGraphConfig(
                token_budgets=tuple(sum(i.output_tokens for i in item) for item in items)
            )
        ladder = EncoderCudaGraphConfig().resolve(encoder)
        batches = [batch for item in items for batch in plan(item, ladder, AssumedCosts())]
        used = {batch.rung.token_budget for batch in batches if batch.rung}
        return (
            EncoderCudaGraphConfig(token_budgets=tuple(used)) if used else EncoderCudaGraphConfig()
        )

    def release(self) -> None:
        """Free graphs and weights."""
        if self._encoder is not None:
            self._encoder.release_graphs()
        self._encoder = None

    def _captured(self) -> EncoderCudaGraphManager:
        encoder = self.encoder()
        require_cuda(encoder.device, "a CUDA graph")
        if encoder.graphs is None:
            encoder.capture(self.config())
        assert encoder.graphs is not None
        return encoder.graphs

    def _batches(self, job: Job) -> list[Batch]:
        graphs = self._captured()
        return plan(self.encoder().item_specs(job.grids), graphs.rungs, graphs.costs)

    def _replayed(self, job: Job) -> RungLimits:
        """The rung that serves the whole call."""
        batches = self._batches(job)
        if any(batch.rung is None for batch in batches):
            raise UnavailableError("an item is not replayed; `ours` runs it eagerly")
        if len(batches) > 1:
            raise UnavailableError(
                f"the call is {len(batches)} replays with inputs of their own; only `ours` has both"
            )
        (rung,) = [batch.rung for batch in batches if batch.rung is not None]
        return rung

    def _eager(self, job: Job) -> Provider:
        encoder = self.encoder()

        @torch.inference_mode()
        def call() -> dict[str, torch.Tensor]:
            return encoder.eager_forward(job.pixel_values, job.grids)

        def features() -> list[torch.Tensor]:
            out = call()
            deepstack = range(len(encoder.spec.deepstack_layers))
            pooled = out["last_hidden_state" if encoder.spec.merger == "none" else "pooler_output"]
            return [pooled, *(out[f"deepstack_{j}"] for j in deepstack)]

        attention = encoder.attention
        return Provider(call, features, len(job.pixel_values), attention=attention, replays=0)

    def _graph(self, job: Job) -> Provider:
        encoder, graphs, rung = self.encoder(), self._captured(), self._replayed(job)
        assert graphs.ladder is not None
        recording = graphs.ladder.rungs[rung].graphs[0].recordings[ONLY_VARIANT]

        # the call stages the inputs, and what it returns was written by these same recordings
        def features() -> list[torch.Tensor]:
            return features_of(encoder(job.pixel_values, job.grids))

        attention = encoder.attention
        return Provider(
            recording.replay, features, rung.max_patches, attention=attention, replays=1
        )

    def _call(self, job: Job) -> Provider:
        encoder, batches = self.encoder(), self._batches(job)
        items = encoder.item_specs(job.grids)
        padded = sum(
            batch.rung.max_patches
            if batch.rung
            else sum(items[i].input_size for i in batch.indices)
            for batch in batches
        )
        grid_thw = torch.tensor(job.grids)  # on the CPU, where a processor leaves it

        def call() -> Any:
            return encoder(job.pixel_values, grid_thw)

        return Provider(
            call,
            lambda: features_of(call()),
            padded,
            attention=encoder.attention,
            replays=sum(batch.rung is not None for batch in batches),
        )
