"""A policy gives every complete page of a request a number, higher meaning needed sooner, and says what it needs."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from sglang_lsa.config import LSAConfig
from sglang_lsa.engine.native_index import IndexKeys, IndexObserver, NativeIndex
from sglang_lsa.engine.observe import PageKeys, QueryObserver
from sglang_lsa.engine.request import Request
from sglang_lsa.indexer.expectation import Expectation
from sglang_lsa.memory.layout.base import KVLayout
from sglang_lsa.memory.ranks import Ranks
from sglang_lsa.memory.scores import Reduction


@dataclass(frozen=True)
class Parts:
    """What a policy may be made of.

    Attributes:
        virtual_pages: that there can be.
        observer: of recent queries; of the model's own index where it has one.
        page_keys: bounds of the keys of complete pages; of no layer where no policy looks at them. Or index keys.
        softmax_scale: of the model.
        ranks: that share the model's heads.
        index: the model's own; None for one that attends to all that it is given.
    """

    config: LSAConfig
    layout: KVLayout
    virtual_pages: int
    observer: QueryObserver | IndexObserver
    page_keys: PageKeys | IndexKeys
    softmax_scale: float
    index: NativeIndex | None = None
    ranks: Ranks = field(default_factory=Ranks)


class Policy(ABC):
    """Scores the complete pages of a request. One file each; :func:`sglang_lsa.engine.policies.register` names it.

    Attributes:
        name: by which it is asked for.
        queries: it looks at what a request's recent tokens ask, of attention or of the model's own index. What does not
            is a baseline, and stays one: no other hint is followed for it.
        page_keys: it looks at the bounds of the keys of pages.
        index: it looks at the model's own index, and not at attention.
        calibrated: its scores are shares of attention, so that they can be added up, and have a threshold.
        across_ranks: how scores of ranks with some of the heads each become those of the model.
        threshold: of a calibrated one: score from which on a page is worth keeping, unless configured.
        expectation: of a calibrated one: what its sets really cover, measured; None where that is not known.
    """

    name: ClassVar[str]
    queries: ClassVar[bool] = False
    page_keys: ClassVar[bool] = False
    index: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    across_ranks: ClassVar[Reduction] = Reduction.SAME
    threshold: float = 0.0
    expectation: Expectation | None = None

    @classmethod
    def build(cls, parts: Parts) -> Policy:
        """The one of a server."""
        return cls()

    @classmethod
    def positions(cls, config: LSAConfig) -> int:
        """Recent positions whose queries it lets vote, if it looks at queries."""
        return config.query_tokens

    @classmethod
    def page_bytes(cls, config: LSAConfig) -> int:
        """Device bytes that it keeps of a page itself."""
        return 0

    @classmethod
    def rank_page_bytes(cls, config: LSAConfig, ranks: int) -> int:
        """The same on that of so many ranks which has the most; all of it, if it does not say."""
        return cls.page_bytes(config)

    @classmethod
    def fixed_bytes(cls, config: LSAConfig, index: NativeIndex) -> int:
        """Device bytes that it takes however many pages there are, beside a model with an index of its own."""
        return 0

    @property
    def nbytes(self) -> int:
        """Device bytes that it keeps itself."""
        return 0

    def complete(self, virtual: np.ndarray, physical: np.ndarray) -> None:
        """Remember pages that have just been filled, reading them from the device pool."""
        return

    def finish(self, scores: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
        """Scores of the model, ``[n]``, when those of its heads together are ``scores``."""
        return scores

    def finish_all(self, scores: np.ndarray | torch.Tensor, sizes: Sequence[int]) -> np.ndarray | torch.Tensor:
        """:meth:`finish` of several requests, of so many pages each, one after the other."""
        if type(self).finish is Policy.finish:
            return scores
        ends = np.cumsum(sizes)
        found = [self.finish(scores[end - size : end]) for end, size in zip(ends.tolist(), sizes, strict=True)]
        return torch.cat([torch.as_tensor(part) for part in found])

    def score_all(self, requests: Sequence[Request], pages: Sequence[np.ndarray]) -> torch.Tensor | None:
        """:meth:`score` of several requests, whose windows end in the same step, in one call.

        Each must get what it would get alone, bit for bit: which pages a request reads does not depend on its company.

        Args:
            pages: of each request, as for :meth:`score`.

        Returns:
            float ``[n]``, one request after the other; None from a policy that scores one at a time.
        """
        return None

    def together(self, stage: str) -> bool:
        """Whether a stage of several requests, ``score`` or ``finish``, is of the same class as that of one, and not of
        an ancestor whose numbers are others."""
        return _newest(self, f"{stage}_all") >= _newest(self, stage)

    @abstractmethod
    def score(self, request: Request, pages: np.ndarray) -> np.ndarray | torch.Tensor:
        """``pages``: virtual ids of the complete pages, int64 ``[n]``. Returns float ``[n]``, on the host or, queued
        behind the forward pass, on the device."""


def _newest(policy: Policy, name: str) -> int:
    """How far from the root of its class's ancestors a policy's method is defined; farthest if it is its own."""
    return len(type(policy).__mro__) + 1 if name in vars(policy) else _newest_of(type(policy), name)


@functools.cache
def _newest_of(kind: type[Policy], name: str) -> int:
    ancestors = kind.__mro__
    return len(ancestors) - next(at for at, c in enumerate(ancestors) if name in vars(c))
