"""Our packed attention inside Hugging Face's own modules.

transformers looks the attention function up by the name in `config._attn_implementation`. A tower
hands over a packed batch as it is, with `cu_seq_lens_q`, only if that name contains "flash"; else
it reads the offsets on the host and calls the function once for every segment.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakValueDictionary

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


# The lock of each config that a switch holds, by identity: configs are equal by value and have no
# hash. Whoever holds a lock holds its config too, so no other config has that identity meanwhile.
_locks: WeakValueDictionary[int, Any] = WeakValueDictionary()
_finding_locks = threading.Lock()


def _lock_of(config: Any) -> Any:
    with _finding_locks:
        lock = _locks.get(id(config))
        if lock is None:
            lock = _locks[id(config)] = threading.RLock()
        return lock


def _switched_configs(tower: torch.nn.Module) -> list[Any]:
    """The configs in which modules of `tower` find the name, each before those inside it."""
    left: list[Any] = [getattr(module, "config", None) for module in tower.modules()]
    configs: dict[int, Any] = {}
    while left:
        config = left.pop(0)
        if hasattr(config, "_attn_implementation"):
            # taken out and put back, as one may be both a module's and inside that of another
            configs.pop(id(config), None)
            configs[id(config)] = config
            # setting the name of a config sets those of the configs inside it
            left += [getattr(config, key, None) for key in getattr(config, "sub_configs", ())]
    return list(configs.values())


class AttentionSwitch:
    """Gives a tower our attention for the time of a call.

    Attributes:
        locks: Of the configs that are switched; other encoders of the same tower, and towers that
            share a config with it, have the same ones.
    """

    def __init__(self, tower: torch.nn.Module):
        self._configs = tuple(_switched_configs(tower))
        # in one order for all, so that no two threads wait for each other
        self.locks = tuple(_lock_of(config) for config in sorted(self._configs, key=id))

    @contextmanager
    def held(self) -> Iterator[None]:
        """No other thread switches this tower meanwhile.

        A call of the tower's own forward has to hold it, or it might run with our attention.
        """
        with ExitStack() as stack:
            for lock in self.locks:
                stack.enter_context(lock)
            yield

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
        with self.held():
            before = [config._attn_implementation for config in self._configs]
            for config in self._configs:
                config._attn_implementation = implementation
            try:
                yield
            finally:
                for config, name in zip(self._configs, before, strict=True):
                    config._attn_implementation = name
