"""The swap of an InternVL tower and, where its model has one, of the projector behind it."""

import functools
import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch

from .fp8 import Fp8Plan
from .grids import PIXEL_DTYPES
from .hf_tower import GraphChoice, check_plain
from .image_swap import SwappedImageTower
from .image_tower import live_tensors, live_weights, path_configs
from .internvl import spec, tower_spec
from .internvl_encoder import InternVLEncoder
from .tower_contents import TowerContents
from .transformers_compat import image_features_select_states, selects_last_state

logger = logging.getLogger("vitgraph")

MODEL_CLASSES = ("InternVLModel", "QianfanOCRModel")  # of transformers: tower and projector
PROJECTED = "vitgraph_projected"  # asks the swapped tower for what the projector makes of it, too


class SwappedInternVLTower(SwappedImageTower):
    """An InternVL tower whose calls go to the fused one; also the handle of the swap.

    Where the tower is inside an `InternVLModel`, the model's `get_image_features` goes to the fused
    tower and projector together, in one graph. Graphs serve tiles of the model's size; others are
    encoded eagerly.

    transformers 5.23 adds the last of the `hidden_states` to what `get_image_features` returns,
    which nothing reads. For towers that end in a norm, that state is the one before it, and ours
    leave it out.

    Beside the reasons of `SwappedTower`, calls go to Hugging Face's forward for tiles whose sides
    are not whole patches that can be joined ("image size"), for pixels that are not floats
    ("pixel_values dtype"), and for arguments that only that forward knows.
    The model's own projector runs behind the fused tower, with the reason
    counted, for tiles that are not square ("projector image size"), for pixels that the model has
    to make floats first ("projector pixel_values dtype"), another `vision_feature_select_strategy`
    than "default", while the projector trains, needs grad, has hooks, on any module in it, or was
    replaced ("projector training", ...), and where it is not in the tower's dtype and on its
    device, or is not what its config says ("projector").
    """

    def __init__(
        self,
        tower: torch.nn.Module,
        parent: torch.nn.Module | None,
        *,
        graphs: GraphChoice,
        attention: str | None,
        precision: str | Fp8Plan = "native",
    ):
        self.parent: Any = parent
        self._projector: Any = None  # that of the parent, from `_build` on
        self._seen_projector: TowerContents | None = None
        self._is_projector_dirty = False
        home = sys.modules[type(tower).__module__]
        output_class = getattr(home, f"{type(tower).__name__}OutputWithPooling")
        # before the tower is patched, whatever may raise
        if parent is not None:
            self._seen_projector = TowerContents(self.parent.multi_modal_projector)
            self._hf_features = self.parent.get_image_features
            self._features_before = parent.__dict__.get("get_image_features")
            self._features = ImageFeatures(self)
        super().__init__(tower, graphs=graphs, attention=attention, precision=precision)
        self._output_class = output_class
        if parent is not None:
            self.parent.get_image_features = self._features

    def __call__(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The tower's forward of tiles [N, C, H, W], with its arguments and output class."""
        projected = kwargs.pop(PROJECTED, False)
        if bool_masked_pos is not None:
            kwargs["bool_masked_pos"] = bool_masked_pos
        encoder: Any = self.encoder
        num_states = encoder.spec.depth + 1
        asked = dict(kwargs)
        # the result itself, but for towers that end in a norm
        is_last = not encoder.spec.final_norm and selects_last_state(
            asked.get("output_hidden_states"), num_states
        )
        if is_last:
            del asked["output_hidden_states"]
        reason = self._reason_for_hf(pixel_values, pixel_values, asked)
        if reason is None and pixel_values is not None:
            if pixel_values.dtype not in PIXEL_DTYPES:
                reason = "pixel_values dtype"
            elif not self._can_cut(pixel_values):
                reason = "image size"
        reason = self._settle_projected(reason) if projected else self._settle(reason)
        if reason is None and pixel_values is not None:
            encoder = self.encoder  # it may have been built anew
            names = ["last_hidden_state"]
            if projected and encoder.spec.out_size:
                names.append("pooler_output")
            features = encoder.features(pixel_values, names)
            assert self._output_class is not None
            output: Any = self._output_class(last_hidden_state=features["last_hidden_state"])
            if is_last:
                output["hidden_states"] = (None,) * (num_states - 1) + (output[0],)
            if "pooler_output" in features:
                output["pooler_output"] = features["pooler_output"]
            return self._pack(output, kwargs)
        return self._hf_forward(pixel_values, **kwargs)

    def image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's `get_image_features`, with its arguments and output class."""
        config = self.parent.config
        choices = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
        }
        choices = {n: getattr(config, n) if v is None else v for n, v in choices.items()}
        encoder: Any = self.encoder
        # what the tower refuses by itself, it counts by itself
        if (
            self.is_active
            and choices["vision_feature_layer"] == -1
            and self._reason_for_hf(pixel_values, pixel_values, kwargs) is None
            and self._seen.change() != "modules"
            and self._can_cut(pixel_values)
        ):
            reason = self._reason_for_own_projector(pixel_values, choices)
            if reason is None:
                others = {**kwargs}
                if image_features_select_states() and not encoder.spec.final_norm:
                    others["output_hidden_states"] = -1
                return_dict = others.pop("return_dict", None)
                if return_dict is None:
                    return_dict = config.return_dict
                output = self.tower(
                    pixel_values=pixel_values, return_dict=True, **{PROJECTED: True}, **others
                )
                # none if the parts have moved apart, or a hook has changed what the tower is asked
                if output.pooler_output is not None:
                    return output if return_dict else output.to_tuple()
                reason = "projector"
            with self._lock:
                self._note(reason)
                # as in `_note`; calls of the tower alone need not read the projector again
                self._is_projector_dirty |= reason in ("projector grad", "projector training")
        return self._hf_features(
            pixel_values=pixel_values, vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy, **kwargs,
        )  # fmt: skip

    def restore(self) -> None:
        """Give the tower and its model their own forwards back; see `SwappedTower.restore`.

        Raises:
            RuntimeError: the tower's `forward` was wrapped by something else since the swap.
        """
        was_active = self.is_active
        super().restore()
        if not was_active or self.parent is None:
            return
        # what has wrapped it since stays, and is passed through
        if self.parent.__dict__.get("get_image_features") is self._features:
            if self._features_before is None:
                del self.parent.get_image_features
            else:
                self.parent.get_image_features = self._features_before

    def _can_cut(self, images: torch.Tensor) -> bool:
        encoder: Any = self.encoder
        shape = encoder.spec
        if images.ndim != 4 or images.shape[1] != shape.in_channels:
            return False
        side = shape.patch_size * (shape.merge_size or 1)
        return all(n > 0 and n % side == 0 for n in images.shape[2:])

    def _reason_for_own_projector(
        self, pixel_values: torch.Tensor, choices: Mapping[str, Any]
    ) -> str | None:
        """Why the model's own projector has to run behind the tower, None for the fused one."""
        projector, change = self._projector, self._projector_change()
        if choices["vision_feature_select_strategy"] != "default":
            return "vision_feature_select_strategy"
        if change == "modules" or self.parent.vision_tower is not self.tower:
            return "projector replaced"
        if projector.training:
            return "projector training"
        if torch.is_grad_enabled() and any(p.requires_grad for p in projector.parameters()):
            return "projector grad"
        if any(_is_wrapped(module) for module in projector.modules()):
            return "projector hooks"
        if pixel_values.dtype not in PIXEL_DTYPES:
            return "projector pixel_values dtype"
        if pixel_values.shape[2] != pixel_values.shape[3]:
            return "projector image size"
        encoder: Any = self.encoder
        # without one, a change of place may have made it possible
        return None if encoder.spec.out_size or change == "storage" else "projector"

    def _projector_change(self) -> str | None:
        """What has happened to the projector, as `TowerContents.change` says it."""
        if self._seen_projector is None:
            return None
        if self.parent.multi_modal_projector is not self._projector:
            return "modules"
        return self._seen_projector.change()

    def _settle_projected(self, reason: str | None) -> str | None:
        """As `_settle`, for a call that needs the projector as it is now, too."""
        with self._lock:
            if reason is None:
                has_changed = self._projector_change() is not None
                self._is_dirty |= self._is_projector_dirty or has_changed
                self._is_projector_dirty = False
            return self._settle(reason)

    def _follow(self, change: str | None) -> None:
        is_behind = change is not None or self._is_dirty
        if is_behind and self._projector_change() in ("storage", "modules"):
            change = "storage"  # the encoder was made from another projector
        before = self._seen
        super()._follow(change)
        if self._seen is not before and self._seen_projector is not None:
            self._seen_projector = TowerContents(self._projector)

    def _new_encoder(self) -> "HfInternVLTower":
        self._projector = getattr(self.parent, "multi_modal_projector", None)
        return HfInternVLTower.of_parts(
            self.tower, self.parent, self._projector, self._attention, self._precision
        )

    def _check_config(self, encoder: Any, config: Any) -> None:
        path_configs(encoder.paths, config)


class ImageFeatures:
    """`get_image_features` of a model whose tower is swapped.

    A copy or pickle of the model contains its own instead.
    """

    def __init__(self, swap: SwappedInternVLTower):
        self._swap = swap
        functools.update_wrapper(self, swap._hf_features)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        return self._swap.image_features(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._swap.parent, "get_image_features")


class HfInternVLTower(InternVLEncoder):
    """An encoder of live parts, which reads its weights from both of them again."""

    projector: torch.nn.Module | None = None

    @classmethod
    def of_parts(
        cls,
        tower: Any,
        parent: Any,
        projector: torch.nn.Module | None,
        attention: str | None,
        precision: str | Fp8Plan,
    ) -> "HfInternVLTower":
        """The live tower, with the projector of its model where both can be computed as one.

        Raises:
            ValueError: the tower's config is not supported, its parameters are on several devices
                or hold no data, or a precision that cannot be had.
        """
        shape = tower_spec(tower.config)
        if projector is not None:
            try:
                check_plain(projector)
                _check_place(tower, projector)
                shape = spec(parent.config)
            except ValueError as error:
                logger.info("vision tower: the projector stays the model's own: %s", error)
                projector = None
        weights = live_weights(shape, live_tensors(tower, projector, "vision_tower"))
        encoder = cls(shape, weights, attention=attention, precision=precision)
        encoder.projector = projector
        return encoder

    def load_weights(self, tower: torch.nn.Module) -> None:
        """Re-read every weight of the tower and its projector into the same memory.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing has changed then.
        """
        self._load(live_tensors(tower, self.projector, "vision_tower"))


def parent_of(model: torch.nn.Module, tower: torch.nn.Module) -> torch.nn.Module | None:
    """The model that has `tower` and a projector behind it: `model`, or the one inside it."""
    holder: Any
    for holder in (model, getattr(model, "model", None)):
        if type(holder).__name__ in MODEL_CLASSES and holder.vision_tower is tower:
            return holder
    return None


def _is_wrapped(module: torch.nn.Module) -> bool:
    """Whether a call of `module` does more than the `forward` of its class."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def _check_place(tower: torch.nn.Module, projector: torch.nn.Module) -> None:
    parameters = (*tower.parameters(), *projector.parameters())
    places = sorted({f"{p.dtype} on {p.device}" for p in parameters})
    if len(places) > 1:
        raise ValueError(f"tower and projector are {' and '.join(places)}")
