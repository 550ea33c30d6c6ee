"""Our packed attention inside Hugging Face's own modules.

transformers looks the attention function up by the name in `config._attn_implementation`. A tower
hands over a packed batch as it is, with `cu_seq_lens_q`, only if that name contains "flash"; else
it reads the offsets on the host and calls the function once for every segment.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

from ..kernels.attention import varlen_attention

IMPLEMENTATION = "vitgraph_flash"
SHAPES_ONLY = "shapes only"  # in place of a backend: zeros of the right shape


class NotPackedError(ValueError):
    """A module attends to whole rows without saying where the items end."""


class _Calls(threading.local):
    """What the calls of this thread are computed with, and what they have shown."""

    backend: str | None = None
    head_dim: int = 0


_calls = _Calls()


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """`varlen_attention` as transformers calls an attention function.

    Args:
        module: the caller.
        query: [1, H, T, D].
        key, value: [1, Hkv, T, D]; H is a multiple of Hkv.
        attention_mask: None: the offsets say who sees whom.
        scaling: factor of the scores; None is D ** -0.5.
        cu_seq_lens_q: int32 [S + 1].
        max_length_q: rows of the longest segment, or more.

    Returns:
        [1, T, H, D], zero outside the segments; and None for the weights.

    Raises:
        NotPackedError: no offsets, or a mask.
        RuntimeError: called outside `AttentionSwitch.using`.
    """
    if _calls.backend is None:
        raise RuntimeError(
            f"attn_implementation = {IMPLEMENTATION!r} serves vitgraph's generic towers only; set "
            "another one for calls of your own, such as 'sdpa'"
        )
    if cu_seq_lens_q is None or attention_mask is not None or query.shape[0] != 1:
        raise NotPackedError(
            f"{type(module).__name__} attends to all rows of a call without cu_seqlens, so items "
            "would see each other and the padding"
        )
    heads, rows, head_dim = query.shape[1:]
    _calls.head_dim = max(_calls.head_dim, head_dim)
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = query.new_zeros(rows, heads, head_dim)
    if _calls.backend != SHAPES_ONLY:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        varlen_attention(
            q,
            k,
            v,
            cu_seq_lens_q,
            max_seqlen=rows if max_length_q is None else max_length_q,
            scale=head_dim**-0.5 if scaling is None else scaling,
            out=out,
            backend=_calls.backend,
        )
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, packed_attention)


class AttentionSwitch:
    """Gives a tower our attention for the time of a call.

    Attributes:
        lock: Held during such calls. A call of the tower's own forward by another thread has to
            hold it too, or it would run with our attention.
    """

    def __init__(self, tower: torch.nn.Module):
        found: list[Any] = [getattr(module, "config", None) for module in tower.modules()]
        configs = {id(c): c for c in found if hasattr(c, "_attn_implementation")}
        self._configs = tuple(configs.values())
        self.lock = threading.RLock()

    @contextmanager
    def using(self, backend: str) -> Iterator[None]:
        """Calls of this thread attend with `backend`, one of ours or `SHAPES_ONLY`."""
        before = _calls.backend
        with self._set(IMPLEMENTATION):
            _calls.backend = backend
            try:
                yield
            finally:
                _calls.backend = before

    @contextmanager
    def split(self) -> Iterator[None]:
        """Calls attend as Hugging Face does, segment by segment."""
        with self._set("sdpa"):
            yield

    @contextmanager
    def observing_head_dim(self) -> Iterator[list[int]]:
        """The list holds the widest head that `using` has seen, when the block is left."""
        before, _calls.head_dim = _calls.head_dim, 0
        seen: list[int] = []
        try:
            yield seen
        finally:
            seen.append(_calls.head_dim)
            _calls.head_dim = before

    @contextmanager
    def _set(self, implementation: str) -> Iterator[None]:
        with self.lock:
            before = [config._attn_implementation for config in self._configs]
            for config in self._configs:
                config._attn_implementation = implementation
            try:
                yield
            finally:
                for config, name in zip(self._configs, before, strict=True):
                    config._attn_implementation = name
