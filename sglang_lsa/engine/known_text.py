"""The text of a request as it grows, in one array: a refresh that looks something up in it does not copy it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROOM = 4096
"""Tokens of an answer for which there is room from the beginning."""


class KnownText:
    """Prompt and answer of a request in one array. Only what was generated is copied with every look at it.

    Token ids take 4 bytes where all of them fit into these.
    """

    def __init__(self) -> None:
        self._ids = np.zeros(0, dtype=np.int32)
        self._prompt: Sequence[int] | None = None
        self._tokens = 0
        """Of the prompt, as it was copied."""

    def first(self, tokens: int, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        """At most the first ``tokens`` token ids, integers ``[n]``; good until the next call.

        Args:
            prompt: the same object as in the call before, unless it has changed.
            answer: what was generated so far; any of it may be other than before.
        """
        generated = np.asarray(answer, dtype=np.int64)
        if prompt is not self._prompt or len(prompt) != self._tokens:
            self._copy(prompt)
        known = self._tokens + len(generated)
        if self._ids.dtype == np.int32 and not _narrow(generated):
            self._ids = self._ids.astype(np.int64)
        if known > len(self._ids):
            grown = np.empty(known + max(ROOM, len(generated) // 4), dtype=self._ids.dtype)
            grown[: self._tokens] = self._ids[: self._tokens]
            self._ids = grown
        self._ids[self._tokens : known] = generated
        return self._ids[: min(tokens, known)]

    def _copy(self, prompt: Sequence[int]) -> None:
        ids = np.asarray(prompt, dtype=np.int64)
        self._ids = np.empty(len(ids) + ROOM, dtype=np.int32 if _narrow(ids) else np.int64)
        self._ids[: len(ids)] = ids
        self._prompt, self._tokens = prompt, len(ids)


def _narrow(ids: np.ndarray) -> bool:
    """Whether these fit into 4 bytes."""
    return not len(ids) or (int(ids.max()) < 1 << 31 and int(ids.min()) >= -(1 << 31))
