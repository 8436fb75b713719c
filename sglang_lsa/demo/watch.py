"""Watches an LSA server's ``/lsa/status`` while it works."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

from sglang_lsa.server_process import ServerProcess


class StatusWatch:
    """Takes the status at the start, every ``seconds`` (None: not at all), and at the end; a context manager."""

    def __init__(self, server: ServerProcess, seconds: float | None = 0.2):
        self.server, self.seconds = server, seconds
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}
        self.samples: list[dict[str, Any]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> StatusWatch:
        self.before = self.server.get("/lsa/status")
        if self.seconds is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        if error is not None:
            return  # the server may be gone; the thread ends by itself
        if self._thread.ident is not None:
            self._thread.join()
        self.after = self.server.get("/lsa/status")

    def _watch(self) -> None:
        while not self._end.wait(self.seconds):
            try:
                self.samples.append(self.server.get("/lsa/status"))
            except OSError:
                return  # whoever asks the questions reports it


def gained(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """What the server's counters gained between two statuses."""
    return {
        "recalled_pages": after["recalls"]["pages"] - before["recalls"]["pages"],
        "recalled_bytes": after["recalls"]["bytes"] - before["recalls"]["bytes"],
        "evicted_pages": after["evictions"] - before["evictions"],
        "prompt_tokens": after["radix"]["prompt_tokens"] - before["radix"]["prompt_tokens"],
        "prefix_hit_tokens": after["radix"]["hit_tokens"] - before["radix"]["hit_tokens"],
    }


def busiest(samples: list[dict[str, Any]]) -> dict[str, int] | None:
    """Device KV when most requests decoded at the same time, all of them past prefill; None if never seen.

    ``full_pages`` is what these requests would hold without LSA were nothing shared among them; ``cached_pages`` is
    everything the server can answer from without prefill, shared pages counted once.
    """
    decoding = [sample for sample in samples if sample["running"]["requests"] and not sample["running"]["dense"]]
    if not decoding:
        return None
    sample = max(decoding, key=lambda sample: (sample["running"]["requests"], sample["physical"]["held"]))
    full = sample["running"]["context_pages"]
    return {
        "requests": sample["running"]["requests"],
        "held_pages": sample["physical"]["held"],
        "held_bytes": sample["physical"]["held"] * sample["page_bytes"],
        "cached_pages": sample["virtual"]["allocated"],
        "cached_bytes": sample["virtual"]["allocated"] * sample["page_bytes"],
        "full_pages": full,
        "full_bytes": full * sample["page_bytes"],
    }
