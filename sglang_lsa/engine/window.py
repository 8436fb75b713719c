"""The window clock: when the next resident set of a request is predicted, and when it is read. Pure step arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sglang_lsa.engine.request import Request

NEVER = 1 << 62
"""Steps left of a window that is not followed by another."""


@dataclass
class Clock:
    """Counts decode steps, of the server and of each request.

    Attributes:
        window: decode steps of a whole window.
        first_window: of the first one; windows double until they are whole. 0: all are whole.
        lead: decode steps from the start of a refresh to the window that it is for.
        lag: forward passes after which scores are read.
        step: forward passes so far.
        running: requests of the last decode step.
    """

    window: int
    first_window: int = 0
    lead: int = 0
    lag: int = 0
    step: int = 0
    running: int = 0

    def begin(self, request: Request) -> bool:
        """The prompt is prefilled. Returns whether the first set is to be predicted now: not when the request reads
        everything for some steps more, or names its sets itself."""
        request.steps_left, request.computed, request.lead = 0, request.tokens, self.lead
        if request.given is not None:
            self._await_given(request)
            return request.steps_left <= self.lead
        if request.asked.dense_steps and not request.resident.incomplete:
            # What is predicted during its last steps would hardly know the answer: a quarter must do for the pages.
            request.steps_left, request.lead = request.asked.dense_steps, min(self.lead, request.asked.dense_steps // 4)
            return False
        if request.resident.tail_start:  # it can go on with what its prompt read, while pages of its own set come
            request.steps_left = self.lead // 4
        return True

    def end_step(self, requests: Iterable[Request]) -> list[Request]:
        """A decode step of these is done, or (GPU) queued: returns those whose next set is to be predicted now."""
        ending = []
        for request in requests:
            if request.story.windows and not request.story.windows[-1].tokens:
                request.story.windows[-1].tokens = request.tokens
            request.computed = request.tokens
            request.steps_left -= 1
            if request.steps_left <= request.lead and request.resident.next is None:
                ending.append(request)
        return ending

    def next_window(self, request: Request) -> None:
        """The window that was to begin does."""
        length, request.lead = self.window_of(request.window, request.asked.seed)
        request.steps_left += length
        if request.given is not None:
            self._await_given(request)

    def window_of(self, number: int, seed: int) -> tuple[int, int]:
        """Decode steps of a window, and how many before its end the set of the next one is predicted.

        Windows double until they are as long as they may be. The first of those is shorter by a number of the request's
        own, so that requests do not all refresh in the same step.

        Args:
            number: of the window; that of the first is 0.
            seed: of the request.
        """
        whole, number = self.window, max(0, number)
        first = self.first_window or whole
        length, before = (first << min(n, 32) for n in (number, max(0, number - 1)))
        if length < whole:
            return length, min(self.lead, length // 4)
        first_whole = number == 0 or before < whole
        return whole - (seed % (whole - self.lead) if first_whole else 0), self.lead

    def _await_given(self, request: Request) -> None:
        assert request.given is not None
        request.steps_left = request.given[0].tokens - 1 - request.computed if request.given else NEVER
