"""Random draws that depend only on a seed and a position: not on the batch, the slot or a preemption."""

from __future__ import annotations

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A draw in [0, 1) for the token at `position` of a request with `seed`.

    It is two rounds of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators",
    OOPSLA 2014). The second round is keyed with the position, so that neighbouring seeds and positions give
    unrelated draws.
    """
    return (_mix((_mix(seed & _MASK) + position) & _MASK) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
