"""The window clock: when the next resident set of a request is predicted, and when it is read. Pure step arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sglang_lsa.engine.request import Request

NEVER = 1 << 62
"""Steps left of a window that is not followed by another."""
BEATS = 4
"""Steps of a window's length in which those of requests that keep time begin: what a refresh takes is then spread over
some steps still, and groups of requests are formed as many times."""


@dataclass
class Clock:
    """Counts decode steps, of the server and of each request.

    Attributes:
        window: decode steps of a window.
        lead: decode steps from the start of a refresh to the window that it is for.
        lag: forward passes after which scores are read.
        beat: windows begin in decode steps that are multiples of it, so that requests that decode together refresh
            together; at 1, in whatever step a request's own number says.
        step: forward passes so far.
        decoded: decode steps so far.
        running: requests of the last decode step.
    """

    window: int
    lead: int = 0
    lag: int = 0
    beat: int = 1
    step: int = 0
    decoded: int = 0
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
        self.decoded += 1
        for request in requests:
            request.computed = tokens = request.tokens
            if request.unread is not None:
                request.unread.tokens, request.unread = tokens, None
            request.steps_left = left = request.steps_left - 1
            if left <= request.lead and request.resident.next is None:
                ending.append(request)
        return ending

    def next_window(self, request: Request) -> None:
        """The window that was to begin does."""
        request.steps_left += self.window
        if request.window <= 0:  # so that not all of them refresh in the same step
            request.steps_left -= self.beat * (request.asked.seed % ((self.window - self.lead) // self.beat))
        # Of later windows none is shorter, but one that begins early, as under pressure, is out of time. Without a beat
        # nothing else that runs enters.
        request.steps_left -= (self.decoded + request.steps_left) % self.beat
        request.lead = self.lead
        if request.given is not None:
            self._await_given(request)

    def keep_time(self) -> None:
        """Let windows that begin from now on begin in the same few steps, where window and lead have room for that."""
        beat, left = divmod(self.window, BEATS)
        if beat and not left and beat <= self.window - self.lead:
            self.beat = beat

    def _await_given(self, request: Request) -> None:
        assert request.given is not None
        request.steps_left = request.given[0].tokens - 1 - request.computed if request.given else NEVER
