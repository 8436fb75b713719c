"""The rate of requests that a server can just serve."""

from __future__ import annotations

from collections.abc import Callable

OVERLOAD = 0.6
"""A server that completes less than this part of what arrives has a queue all the time; a part nearer to 1 is also seen
of one that keeps up, when many requests happen to arrive late."""
PROBES = 12


def saturation(probe: Callable[[float], tuple[float, float]], start: float) -> float:
    """Requests a second that a server completes when more arrive than it can serve.

    The rate is doubled until clearly less is completed than arrives. What is completed then is what the server can do,
    for it has work all the time. The most that was completed at any rate counts: a server may do less under more load.

    Args:
        probe: requests a second that arrived and that were completed, at a rate.
        start: first rate.

    Returns:
        Requests a second, to three digits.

    Raises:
        ValueError: the server completed nothing, or as much as arrived at every rate.
    """
    rate, most = start, 0.0
    for _ in range(PROBES):
        arrived, completed = probe(rate)
        most = max(most, completed)
        if completed < OVERLOAD * arrived:
            if not most:
                raise ValueError(f"nothing was completed at {rate:g} requests/s: use more --seconds, or give --rates")
            return float(f"{most:.3g}")
        rate *= 2
    raise ValueError(f"the server keeps up with {rate / 2:g} requests/s: use more --seconds, or give --rates")
