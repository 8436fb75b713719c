"""What ``sglang-lsa bench load`` sends: requests that arrive by a Poisson process, drawn from seeds.

The same mix, rate and seconds give the same prompts, lengths and arrival times, whichever system is asked.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

SEED = 25


@dataclass(frozen=True)
class Request:
    """One prompt, of which only the end is its own.

    Attributes:
        at: seconds after the clock starts.
        memory: number of the memory that it begins with; None: it is new from its first token.
        own: token ids after the memory ``[tokens]``.
        answer: tokens it asks for.
    """

    at: float
    memory: int | None
    own: np.ndarray
    answer: int


@dataclass(frozen=True)
class Mix:
    """A kind of traffic.

    Attributes:
        name: for ``--mixes``.
        own: fewest and most tokens of a prompt after its memory; log-uniform between them.
        answer: fewest and most tokens of an answer; uniform.
        memories: how many there are; 0: every prompt is new.
        memory: tokens of the shortest and of the longest memory; the others lie between, evenly in the logarithm.
        start: requests a second at which the search for saturation begins.
    """

    name: str
    own: tuple[int, int]
    answer: tuple[int, int]
    memories: int
    memory: tuple[int, int]
    start: float

    @property
    def memory_lengths(self) -> list[int]:
        return [round(length) for length in np.geomspace(*self.memory, self.memories)]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(self.memory_lengths, default=0) + self.own[1] + self.answer[1]

    def smaller(self, divisor: int) -> Mix:
        """All lengths divided by this, answers and prompts of two tokens at least."""

        def each(lengths: tuple[int, int]) -> tuple[int, int]:
            return max(2, lengths[0] // divisor), max(2, lengths[1] // divisor)

        return dataclasses.replace(
            self, own=each(self.own), answer=each(self.answer), memory=each(self.memory), start=self.start * divisor / 8
        )

    def with_memories(self, memories: int) -> Mix:
        """With so many of them, if it has any."""
        return dataclasses.replace(self, memories=memories if self.memories else 0)

    def memory_texts(self, vocabulary: int) -> list[np.ndarray]:
        """Token ids of every memory."""
        return [
            np.random.default_rng((SEED, 0, number)).integers(10, vocabulary, length)
            for number, length in enumerate(self.memory_lengths)
        ]

    def requests(self, rate: float, seconds: float, vocabulary: int, turn: int = 0) -> list[Request]:
        """All requests that arrive within ``seconds``, in order.

        Args:
            rate: requests a second, on average.
            turn: another one has other requests of the same kind.

        Raises:
            ValueError: none arrives.
        """
        name = int.from_bytes(self.name.encode()[:8], "big")
        draw = np.random.default_rng((SEED, name, round(rate * 1e6), turn))
        times = arrivals(rate, seconds, draw)
        if not len(times):
            raise ValueError(f"at {rate:g} requests/s none arrives in {seconds:g} s: use more --seconds or --rates")
        own = np.exp(draw.uniform(np.log(self.own[0]), np.log(self.own[1]), len(times))).round().astype(int)
        answers = draw.integers(self.answer[0], self.answer[1] + 1, len(times))
        memories: list[int | None] = [None] * len(times)
        if self.memories:
            memories = draw.integers(0, self.memories, len(times)).tolist()
        return [
            Request(at, memory, draw.integers(10, vocabulary, tokens), answer)
            for at, memory, tokens, answer in zip(times.tolist(), memories, own, answers.tolist(), strict=True)
        ]


def arrivals(rate: float, seconds: float, draw: np.random.Generator) -> np.ndarray:
    """Times of a Poisson process within ``seconds``, in order: their number is Poisson's, each is anywhere."""
    return np.sort(draw.uniform(0, seconds, draw.poisson(rate * seconds)))


MIXES = {
    mix.name: mix
    for mix in (
        Mix("agents", own=(1000, 1000), answer=(200, 800), memories=16, memory=(32_000, 128_000), start=0.5),
        Mix("documents", own=(8000, 64_000), answer=(200, 800), memories=0, memory=(1, 1), start=0.25),
    )
}
SMALLER = {"tiny": 64}
"""By what the lengths are divided, by model: for machines without a GPU."""
