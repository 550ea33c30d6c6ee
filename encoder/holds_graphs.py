"""What every encoder does with the graphs that it has captured."""

from typing import Any, Generic, TypeVar

from ..capture import EncoderCudaGraphManager
from ..capture.multi_path import MultiPathManager

Manager = TypeVar("Manager", EncoderCudaGraphManager, MultiPathManager)


class HoldsGraphs(Generic[Manager]):
    """An encoder that replays graphs while it has any.

    Attributes:
        graphs: The capture manager, None while not captured.
    """

    graphs: Manager | None = None

    def release_graphs(self) -> None:
        """Free the captured graphs and their buffers; calls run eagerly again.

        A call of another thread that has begun to use them raises RuntimeError.
        """
        graphs, self.graphs = self.graphs, None  # first: calls of other threads find none or all
        if graphs is not None:
            graphs.clear()

    def stats(self) -> dict[str, Any]:
        """Counters of the graphs; see `stats` of the manager.

        Raises:
            RuntimeError: nothing is captured.
        """
        if self.graphs is None:
            raise RuntimeError("stats: nothing is captured; call capture() first")
        return self.graphs.stats()
