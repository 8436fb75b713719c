"""What a run under load came to: throughput, latencies and goodput."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sglang_lsa.bench.load_client import Load, Sent
from sglang_lsa.bench.systems import Row


@dataclass(frozen=True)
class Objective:
    """What a request must be served with to count for goodput.

    Attributes:
        ttft_s: most seconds from its arrival to its first token.
        tpot_ms: most milliseconds between two tokens, on average over the answer.
    """

    ttft_s: float
    tpot_ms: float

    def met(self, sent: Sent) -> bool:
        return sent.done and ttft(sent) <= self.ttft_s and tpot_ms(sent) <= self.tpot_ms

    def patience(self, tokens: int) -> float:
        """Seconds after which a request of so many tokens that is not done cannot have met it."""
        return self.ttft_s + self.tpot_ms / 1000 * tokens


def ttft(sent: Sent) -> float:
    """Seconds from arrival to the first token, which has come."""
    return sent.stream.times[0] - sent.request.at


def tpot_ms(sent: Sent) -> float:
    """Milliseconds per token after the first chunk; 0 where there is none."""
    times, tokens = sent.stream.times, sent.stream.tokens
    return 1000 * (times[-1] - times[0]) / max(1, tokens[-1] - tokens[0])


def gaps_ms(sent: Sent) -> np.ndarray:
    """Milliseconds per token of every chunk after the first."""
    tokens = np.diff(sent.stream.tokens)
    return (np.diff(sent.stream.times) * 1000 / np.maximum(1, tokens))[tokens > 0]


def waits(load: Load) -> np.ndarray:
    """Seconds to the first token of every request that was not refused before it; of those that had none when the run
    ended, how long they had waited by then, which is less than it would have been."""
    some = [one for one in load.sent if one.stream.times or one.refused is None]
    return np.array([ttft(one) if one.stream.times else load.end - one.request.at for one in some])


def tokens_within(sent: Sent, seconds: float) -> int:
    """Tokens that had come by then."""
    return max((n for at, n in zip(sent.stream.times, sent.stream.tokens, strict=True) if at <= seconds), default=0)


def completed_within(load: Load, begin: float, end: float) -> int:
    """Requests whose last token came in this time."""
    return sum(begin < sent.stream.times[-1] <= end for sent in load.sent if sent.done)


def figures(load: Load, objective: Objective) -> Row:
    """Columns of the results. Rates are over the time in which requests arrived; the objective is asked of every
    request that arrived: refused and unfinished ones missed it."""
    sent, seconds = load.sent, load.seconds
    met, refused = sum(map(objective.met, sent)), sum(one.refused is not None for one in sent)
    pace = np.concatenate([gaps_ms(one) for one in sent] or [np.array([])])
    first = waits(load)
    prompt = sum(one.stream.prompt_tokens for one in sent)
    return {
        "requests": len(sent),
        "completed": sum(one.done for one in sent),
        "unfinished": sum(not one.done and one.refused is None for one in sent),
        "refused": refused,
        "met_objective": met,
        "late": len(sent) - met - refused,
        "goodput_per_s": met / seconds,
        "completed_per_s": completed_within(load, 0, seconds) / seconds,
        "output_tokens_per_s": sum(tokens_within(one, seconds) for one in sent) / seconds,
        "ttft_s_p50": percentile(first, 50),
        "ttft_s_p99": percentile(first, 99),
        "no_first_token": sum(not one.stream.times and one.refused is None for one in sent),
        "itl_ms_p50": percentile(pace, 50),
        "itl_ms_p99": percentile(pace, 99),
        "running_mean": float(np.mean(load.running)) if load.running else None,
        "running_max": max(load.running, default=None),
        "waiting_max": max(load.waiting, default=None),
        "retractions": sum(int(one.stream.usage.get("num_retractions", 0)) for one in sent),
        "cached_fraction": sum(one.stream.cached or 0 for one in sent) / prompt if prompt else None,
        "client_lag_s_max": max(one.lag for one in sent),
    }


def percentile(values: Sequence[float] | np.ndarray, q: float) -> float | None:
    """None where there are no values."""
    return float(np.percentile(values, q)) if len(values) else None
