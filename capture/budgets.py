"""The automatic ladder of token budgets.

Padding up to a rung is paid by every library GEMM, while one more rung costs little memory because
rungs share their static buffers and their pool. So the ladder is dense, eight rungs an octave, but
not denser than the GEMMs can tell apart: their tiles are 64 to 256 rows high, and a token is 4
rows. Steps are 64 rows between 128 and 256 tokens, 128 rows up to 512, and whole multiples of 256
rows above, so that no rung ends inside a tile.
"""

_FINEST_STEP = 8
_STEPS_PER_OCTAVE = 8


def generate_budgets(minimum: int, maximum: int) -> tuple[int, ...]:
    """Token budgets from about `minimum` to exactly `maximum`, ascending.

    Above 64 tokens a rung is at most 1.125 times the one below it. Every rung but `maximum` is a
    multiple of 8 tokens (of 16 from 128, 32 from 256, 64 from 512), and no rung is below `minimum`.
    From 16 to 16,384 tokens there are 71.

    Raises:
        ValueError: `minimum` or `maximum` is not positive, or `minimum` exceeds `maximum`.
    """
    if minimum <= 0 or maximum <= 0:
        raise ValueError(
            f"generate_budgets: minimum={minimum} and maximum={maximum} must both be at least 1 "
            "token; pass token_budgets, or an encoder whose budget_range() is positive"
        )
    if minimum > maximum:
        raise ValueError(
            f"generate_budgets: minimum={minimum} exceeds maximum={maximum}; lower "
            "max_vision_items_per_batch or pass token_budgets"
        )
    budgets = []
    budget = _round_up(minimum, _step(minimum))
    while budget < maximum:
        budgets.append(budget)
        budget += _step(budget)
    return (*budgets, maximum)


def _step(budget: int) -> int:
    """An eighth of the power of two at or below `budget`, in whole multiples of 8."""
    octave = 1 << (budget.bit_length() - 1)
    return max(_FINEST_STEP, octave // _STEPS_PER_OCTAVE)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
