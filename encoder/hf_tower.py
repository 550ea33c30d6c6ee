"""The forward that stands in for a Hugging Face tower's own, and the handle that undoes it.

The tower object stays where it is: only its instance attribute `forward` is set, the way
accelerate does it. Parameter names, `state_dict`, `save_pretrained`, `to`, `train`, gradient
checkpointing, `isinstance` and every attribute that the parent reads are therefore the tower's own
by construction.
"""

import logging
import sys
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from ..capture import EncoderCudaGraphConfig
from .families import family_of_tower
from .fp8 import Fp8Plan
from .stream_order import Written
from .tower_contents import TowerContents
from .towers import OWN_ENCODERS, Tier, encoder_for, is_fused
from .vision_encoder import VisionEncoder, VisionOutput

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

    from .generic import GenericEncoder

logger = logging.getLogger("vitgraph")

GraphChoice = bool | EncoderCudaGraphConfig | Mapping[str, Any]
RECORDED = ("output_hidden_states", "output_attentions")
PLAIN_MODULES = ("torch.nn.", "transformers.models.", "transformers.activations")


@dataclass(frozen=True)
class SwapStats:
    """What the calls of a swapped tower did.

    Attributes:
        fused_calls: Calls of our encoder, fused or generic.
        hf_calls: Calls of Hugging Face's own forward, by reason: "training", "grad", "autocast",
            "output_hidden_states", "output_attentions", "no grid_thw", "module replaced", or the
            name of an argument that only that forward knows.
        refreshes: Times the weights were read again into the same memory.
        rebuilds: Times the encoder was built anew, because the tower's storage had moved.
    """

    fused_calls: int
    hf_calls: dict[str, int]
    refreshes: int
    rebuilds: int


class SwappedTower:
    """A tower whose calls go to an encoder of ours; also the handle of the swap.

    Calls go to Hugging Face's forward instead, with a reason counted in `stats()`:
        in training mode; with grad enabled when the pixels or any parameter require grad; under an
        autocast to another dtype than the tower's; when hidden states or attentions are asked for;
        without `grid_thw`; and once a module inside the tower was replaced (an adapter, say).
    Weights that were changed in place are read again before the next fused call, and a tower that
    was moved or cast gets a new encoder. Changes made behind autograd's back (`p.data.copy_`) are
    seen only after a call with grad: call `refresh()`. Hooks on modules inside the tower do not
    fire in fused calls; those on the tower itself do. A wrapper that `forward` had before the swap
    (accelerate's) runs only around Hugging Face's forward.

    Several threads may call it: the first one that finds a change follows it, the others wait.

    A copy or pickle of the model contains the plain Hugging Face tower.

    Attributes:
        tower: The Hugging Face tower.
        encoder: The encoder, fused or generic; another object after a rebuild.
        is_active: False once restored.
    """

    def __init__(
        self,
        tower: torch.nn.Module,
        *,
        graphs: GraphChoice,
        attention: str | None,
        precision: str | Fp8Plan = "native",
        tier: Tier = "auto",
    ):
        self._is_generic = tier == "generic" or (tier == "auto" and not is_fused(tower))
        _check_tower(tower, self._is_generic)
        self.tower = tower
        self.is_active = False
        self._graphs = graphs
        self._attention = attention
        self._precision = precision
        self._hf_forward = tower.forward
        self._patched_before = tower.__dict__.get("forward")
        self._tier: Tier = tier
        self._output_class = None if self._is_generic else _output_class(tower)
        self._fused_calls = 0
        self._hf_calls: Counter[str] = Counter()
        self._refreshes = 0
        self._rebuilds = 0
        self._said_no_graphs = False
        self._is_dirty = False
        self._written: Written | None = None  # by the last change that was followed
        # held while a change is looked for and followed; calls themselves run side by side
        self._lock = threading.RLock()
        self.encoder: VisionEncoder | GenericEncoder = self._build()
        self._seen = TowerContents(tower)
        tower.forward = self
        self.is_active = True

    def __call__(
        self,
        hidden_states: torch.Tensor | None = None,
        grid_thw: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The tower's forward, with its arguments and output classes.

        Tensors computed from `grid_thw` in advance (`cu_seqlens`, `position_ids`, ...) are accepted
        and not needed. `hidden_states` [T, P] are the pixel rows, also accepted as `pixel_values`.
        """
        if hidden_states is None:
            hidden_states = kwargs.pop("pixel_values", None)
        reason = self._settle(self._reason_for_hf(hidden_states, grid_thw, kwargs))
        if reason is None and hidden_states is not None and grid_thw is not None:
            return self._pack(self.encoder(hidden_states, grid_thw), kwargs)
        with self._own_attention():
            return self._hf_forward(hidden_states, grid_thw=grid_thw, **kwargs)

    def refresh(self) -> None:
        """Read all weights from the tower again.

        Raises:
            ValueError: the tower no longer is one that can be swapped; nothing has changed then.
        """
        with self._lock:
            change = self._seen.change()
            if change == "modules":
                _check_tower(self.tower, self._is_generic)
            self._is_dirty = True
            self._follow("storage" if change == "modules" else change)

    def restore(self) -> None:
        """Give the tower its own forward back. Does nothing when that has happened before.

        Raises:
            RuntimeError: `forward` was wrapped by something else since the swap.
        """
        with self._lock:  # after a thread that is building an encoder
            if not self.is_active:
                return
            current = self.tower.__dict__.get("forward")
            if current is not self:
                raise RuntimeError(
                    f"restore: the tower's forward is now a {type(current).__name__}, set after "
                    "swap_vision_tower; undo that first (accelerate: remove_hook_from_module)"
                )
            if self._patched_before is None:
                del self.tower.forward
            else:
                self.tower.forward = self._patched_before
            self.encoder.release_graphs()
            self.is_active = False

    def stats(self) -> SwapStats:
        """Counts since the swap."""
        return SwapStats(self._fused_calls, dict(self._hf_calls), self._refreshes, self._rebuilds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __reduce__(self) -> tuple[Any, ...]:
        # graphs and addresses cannot be copied: in a copy of the tower, its class's own forward
        return getattr, (self.tower, "forward")

    def __repr__(self) -> str:
        state = "active" if self.is_active else "restored"
        return f"SwappedTower({type(self.tower).__name__} on {self.encoder.device}, {state})"

    def _reason_for_hf(
        self,
        hidden_states: torch.Tensor | None,
        grid_thw: torch.Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> str | None:
        """Why a call like this belongs to Hugging Face's forward; None for the fused one."""
        if self.tower.training:
            return "training"
        if torch.is_grad_enabled():
            pixels_do = hidden_states is not None and hidden_states.requires_grad
            if pixels_do or self._seen.requires_grad():
                return "grad"
        for name in RECORDED:
            if kwargs.get(name, getattr(self.tower.config, name, False)):
                return name
        if hidden_states is None or grid_thw is None:
            return "no grid_thw"
        if name := self._unserved_argument(kwargs):
            return name
        kind, dtype = self._seen.place()
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != dtype:
            return "autocast"
        return None

    def _unserved_argument(self, kwargs: Mapping[str, Any]) -> str | None:
        """The first argument of a call that only the tower's own forward heeds."""
        if isinstance(self.encoder, VisionEncoder):
            return None
        return self.encoder.unserved_argument(kwargs)

    def _settle(self, reason: str | None) -> str | None:
        """Count a call, and follow what has changed before one of ours.

        Args:
            reason: Why the call belongs to Hugging Face's forward, None if nothing says so yet.

        Returns:
            The same, or "module replaced".
        """
        with self._lock:
            if reason is None:
                change = self._seen.change()
                if change != "modules":
                    self._follow(change)
                    if self._written is not None:
                        self._written.order_reads()
                    self._fused_calls += 1
                    return None
                reason = "module replaced"
            self._note(reason)
            return reason

    def _note(self, reason: str) -> None:
        """Count a call, or its projection, that runs Hugging Face's own modules."""
        with self._lock:
            if not self._hf_calls[reason]:
                level = logging.WARNING if reason == "module replaced" else logging.INFO
                logger.log(
                    level,
                    "vision tower: running Hugging Face's forward (%s); counted in stats(), "
                    "said once",
                    reason,
                )
            self._hf_calls[reason] += 1
            # an optimizer may step after this call, in ways that versions do not show
            self._is_dirty |= reason in ("grad", "training")

    def _follow(self, change: str | None) -> None:
        """Bring the encoder up to date with the tower; under the lock."""
        if change is None and not self._is_dirty:
            return
        if change == "storage":
            # first, so that two sets of graphs never need room at once
            self.encoder.release_graphs()
            self.encoder = self._build()
            self._rebuilds += 1
        else:
            # buffers born in inference mode could not be written outside of it
            with torch.inference_mode(False), torch.no_grad():
                self.encoder.load_weights(self.tower)
            self._refreshes += 1
        self._written = Written(self.encoder.device)
        self._seen = TowerContents(self.tower)
        self._is_dirty = False

    def _own_attention(self) -> AbstractContextManager[object]:
        """While Hugging Face's forward runs: no other thread gives the tower our attention."""
        if isinstance(self.encoder, VisionEncoder):
            return nullcontext()
        return self.encoder.switch.held()

    def _build(self) -> Any:
        """An encoder of the tower as it is now, captured if it is on a GPU."""
        with torch.inference_mode(False), torch.no_grad():
            encoder = self._new_encoder()
            if self._graphs is False:
                return encoder
            config = None if self._graphs is True else self._graphs
            self._check_config(encoder, config)  # refused without a GPU too
            if encoder.device.type == "cuda":
                encoder.capture(config)
            elif not self._said_no_graphs:
                logger.info("vision tower on %s: no CUDA graphs, calls run eagerly", encoder.device)
                self._said_no_graphs = True
        return encoder

    def _new_encoder(self) -> Any:
        # a tower with an encoder of its own has a swap of its own
        return encoder_for(
            self.tower, tier=self._tier, attention=self._attention, precision=self._precision
        )

    def _check_config(self, encoder: Any, config: Any) -> None:
        """Refuse a configuration of graphs as `capture` would."""
        EncoderCudaGraphConfig.from_any(config)

    def _pack(self, features: "VisionOutput | ModelOutput", kwargs: Mapping[str, Any]) -> Any:
        """The tower's own output object, new for each call: the parent writes into it."""
        output: Any = features
        if isinstance(features, VisionOutput):
            assert self._output_class is not None
            fields: dict[str, Any] = {"last_hidden_state": features.last_hidden_state}
            assert isinstance(self.encoder, VisionEncoder)
            spec, pooled = self.encoder.spec, features.pooler_output
            if spec.merger == "mean":  # patches of a token on an axis of their own
                pooled = pooled.view(-1, spec.patches_per_token, spec.hidden_size)
            if spec.merger != "none":  # transformers leaves the field empty there
                fields["pooler_output"] = pooled
            if self._output_class.__name__ == "BaseModelOutputWithDeepstackFeatures":
                fields["deepstack_features"] = features.deepstack_features or []
            output = self._output_class(**fields)
        return_dict = kwargs.get("return_dict", getattr(self.tower.config, "return_dict", True))
        return output.to_tuple() if return_dict is False else output


def _check_tower(tower: torch.nn.Module, is_generic: bool) -> None:
    """Refuse a tower whose own forward does more than ours would.

    Raises:
        ValueError: unknown class (unless generic), and what `check_plain` refuses.
    """
    if not is_generic:
        family_of_tower(tower)
    check_plain(tower, runs_own_modules=is_generic and type(tower).__name__ not in OWN_ENCODERS)


def check_plain(module: torch.nn.Module, *, runs_own_modules: bool = False) -> None:
    """Refuse modules that do more than their class in transformers says.

    Args:
        module: A tower or projector.
        runs_own_modules: Whether graphs record its own modules, for the message.

    Raises:
        ValueError: a module of another library inside, or a quantised parameter.
    """
    for name, part in module.named_modules():
        home = type(part).__module__
        if not f"{home}.".startswith(PLAIN_MODULES):
            why = "which the fused forward would not run"
            if runs_own_modules:
                why = (
                    "and graphs of the generic tier would go on as recorded when such a module is "
                    "switched without a change of weights"
                )
            raise ValueError(
                f"swap_vision_tower: {name!r} is a {home}.{type(part).__name__}, {why}; merge "
                "adapters and dequantise the vision tower first"
            )
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"swap_vision_tower: parameter {name!r} is {parameter.dtype}; dequantise the "
                "vision tower first"
            )


def _output_class(tower: torch.nn.Module) -> type:
    """The class of output that the tower's forward returns, from the module that defines it."""
    home = sys.modules[type(tower).__module__]
    with_deepstack = getattr(home, "BaseModelOutputWithDeepstackFeatures", None)
    return with_deepstack or home.BaseModelOutputWithPooling
