"""A request before it runs, as the core sees it: when it comes, while it waits, and when its first pass is queued.

SGLang's requests are translated into these in ``patches/requests.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_lsa.config import RequestOptions


@dataclass(frozen=True)
class Arrival:
    """A request that has just come.

    Attributes:
        rid: its name, as its client gave it.
        ids: tokens of its prompt.
        custom_params: of its sampling parameters; what it asks of us is in them.
    """

    rid: str
    ids: Sequence[int]
    custom_params: Mapping[str, Any] | None


@dataclass(frozen=True)
class Verdict:
    """What becomes of an arrival.

    Attributes:
        options: what it asked for, for as long as it is here.
        refusal: why it can never run; None when it may.
        longest_answer: tokens that it may generate at most; None for as many as it likes.
        cache_key: name under which the radix tree keeps its pages apart from those of others; None where it shares.
    """

    options: RequestOptions
    refusal: str | None = None
    longest_answer: int | None = None
    cache_key: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A request that waits.

    Attributes:
        tokens: to prefill: the prompt, and after a retraction what it had generated.
        prefix: virtual pages that the radix tree has of it, int64 ``[n]``.
        warmed: hot pages of its prefix were sent for since it came, or came back.
    """

    rid: str
    options: RequestOptions
    tokens: int
    prefix: np.ndarray
    warmed: bool = False


@dataclass(frozen=True)
class Entry:
    """A request of which nothing was computed since it was admitted.

    Attributes:
        row: in SGLang's ``req_to_token``.
        ids: tokens to prefill, as in :class:`Prompt`.
        new_tokens: the most that it generates.
        text: its first tokens, at most as many as asked for and as far as they are known, integers ``[n]``; good
            until it is asked again.
    """

    rid: str
    row: int
    options: RequestOptions
    ids: Sequence[int]
    new_tokens: int
    text: Callable[[int], np.ndarray]
