"""What a call must cost, and the fastest a device could do it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """FLOP and bytes that any implementation must spend."""

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def speed_of_light_ms(cost: Cost, peak_tflops: float, peak_gbps: float) -> float:
    """Lower bound in ms: the larger of the compute time and the traffic time."""
    return max(cost.flops / (peak_tflops * 1e9), cost.bytes / (peak_gbps * 1e6))
