"""What a contest on towers of images (not of packed patches) has to provide."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

Parts = list[torch.Tensor]  # results that are compared one by one


class ImageContest(Protocol):
    """One tower: the peer's in a dtype and in fp32, and ours with the same weights.

    Attributes:
        encoder: Ours; has `capture`, `release_graphs` and `graphs`.
    """

    encoder: Any

    def inputs(self, workload: Any) -> Any:
        """Random normalised pixels of one of the contest's workloads, on the device."""
        ...

    def patches(self, inputs: Any) -> int:
        """Patches that are not padding."""
        ...

    def theirs(self, inputs: Any, *, exact: bool = False) -> Parts:
        """What the peer computes as its users call it; `exact` in fp32."""
        ...

    def theirs_without_host(self, inputs: Any) -> Callable[[], Parts]:
        """The same by its modules, whatever it reads on the host computed beforehand."""
        ...

    def recorded_parts(self, output: Parts, inputs: Any) -> Parts:
        """What `theirs_without_host` computed, in the form of `theirs`."""
        ...

    def ours(self, inputs: Any) -> Any:
        """The call of a user."""
        ...

    def parts(self, output: Any, inputs: Any) -> Parts:
        """What `ours` returned, in the form of `theirs`."""
        ...
