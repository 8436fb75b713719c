"""An indexer without training: which heads look at evidence, what each is worth, and where the threshold lies, from
prompts whose evidence is known. No gradient step: its towers are the model's own queries and keys."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from sglang_lsa.indexer.checkpoint import IndexerConfig, ModelShape
from sglang_lsa.indexer.expectation import Expectation, Sample
from sglang_lsa.indexer.heads import Head
from sglang_lsa.indexer.model import MemoryIndexer
from sglang_lsa.indexer.watch import Seen, Sees

HEADS, SEES = 16, Sees(positions=64, sub_keys=32, overlap=4)
"""Of a calibrated indexer. On made prompts fewer heads missed values of which a key has several, each of which gets but
a part of what a head pays, and many more diluted the best ones. Heads look at what was asked for, and the answer is in
what follows: that may be on the next page, so that the last few keys of a page count for the one after it, too."""
SINK, RECENT = 1, 4
"""First and last pages that stay whatever their score, and teach nothing."""
LEAST_LIFT = 1.5
"""How much more than its share of pages evidence must get from the best heads, for them to count as looking at it."""
TARGET = 0.99
"""Share of the attention to pages that the threshold keeps: it is to leave out what is worth nothing, also in contexts
longer than the prompts, over whose pages shares are spread thinner."""
FAINT = 1e-9


class NothingFound(ValueError):
    """No heads of the model look at evidence.

    Attributes:
        lift: of the best of them, see :func:`lifts`; 0 where no prompt could tell.
    """

    def __init__(self, message: str, lift: float = 0.0):
        super().__init__(message)
        self.lift = lift


def free(pages: int) -> slice:
    """Those that may be left out."""
    return slice(SINK, max(SINK, pages - RECENT))


def usable(seen: Seen) -> bool:
    """Whether it has evidence among pages that may be left out, and others."""
    return bool(_evidence(seen)) and seen.told.shape[2] - SINK - RECENT >= 4


def _evidence(seen: Seen) -> list[int]:
    inside = range(seen.told.shape[2])[free(seen.told.shape[2])]
    return [page - inside.start for page in seen.evidence if page in inside]


def lifts(seen: Seen) -> torch.Tensor:
    """How much of what the queries of each head tell of far pages, before the answer, is told of evidence, in parts of
    what pages chosen by lot would get: 1 is as good as chance. ``[layers, q_heads]``."""
    told, evidence = seen.told[:, :, free(seen.told.shape[2])], _evidence(seen)
    share = told[:, :, evidence].sum(dim=2) / told.sum(dim=2).clamp(min=FAINT)
    return share * told.shape[2] / len(evidence)


def evidence_mass(seen: Seen) -> torch.Tensor:
    """The most of its attention that each head truly pays to evidence while it answers, ``[layers, q_heads]``."""
    return seen.paid[:, :, free(seen.paid.shape[2])][:, :, _evidence(seen)].mean(dim=2)


def told_mass(seen: Seen) -> torch.Tensor:
    """The same as the queries before the answer tell it."""
    return seen.told[:, :, free(seen.told.shape[2])][:, :, _evidence(seen)].mean(dim=2)


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads that look at evidence.

    Attributes:
        heads: by layer.
        weights: what each is worth beside the others, 1 on average.
        lift: of the best of them, see :func:`lifts`.
    """

    heads: tuple[Head, ...]
    weights: tuple[float, ...]
    lift: float


def find_heads(seen: Sequence[Seen], count: int = HEADS) -> Heads:
    """Heads whose queries, before an answer, tell which pages it is from.

    A head is worth what it tells of evidence, but no more than it then truly pays: the geometric mean of both, over all
    prompts. Heads count that tell of evidence well above chance.

    Raises:
        NothingFound: no head does, or no prompt has evidence to look at.
    """
    told_of = [part for part in seen if usable(part)]
    if not told_of:
        raise NothingFound("none of the prompts has evidence beyond the pages that always stay")
    lift = torch.stack([lifts(part).log1p() for part in told_of]).mean(dim=0).expm1()
    worth = torch.stack([(told_mass(part) * evidence_mass(part)).sqrt() for part in told_of]).mean(dim=0)
    q_heads = worth.shape[1]
    able = torch.where(lift >= LEAST_LIFT, worth, torch.zeros(())).flatten()
    best = able.topk(min(count, int((able > FAINT).sum())))
    if not len(best.values):
        raise NothingFound(
            f"the best of {worth.numel()} heads tells of evidence {float(lift.max()):.1f} times as much as chance: "
            f"{LEAST_LIFT} or more would be a head that looks for it",
            float(lift.max()),
        )
    order = best.indices.argsort()
    places, values = best.indices[order].tolist(), best.values[order]
    weights = values / values.mean()
    heads = tuple((place // q_heads, place % q_heads) for place in places)
    return Heads(heads, tuple(weights.tolist()), float(lift.flatten()[places].max()))


def make_indexer(model: ModelShape, found: Heads, seen: Sequence[Seen], key_dim: int = 0) -> MemoryIndexer:
    """The indexer of these heads, with its threshold and how much of the attention it keeps, on the same prompts.

    Args:
        seen: by what :data:`SEES` says.
        key_dim: dimensions that are kept of keys, those that turn least; 0 keeps all.
    """
    config = IndexerConfig(
        model, found.heads, key_dim=key_dim or model.head_dim, trained=False, **dataclasses.asdict(SEES)
    )
    indexer = MemoryIndexer(config)
    with torch.no_grad():
        # softplus(weight) is log(2) times what a head is worth
        indexer.weight.copy_(torch.tensor([math.log(math.expm1(max(w, 1e-3) * math.log(2))) for w in found.weights]))
        indexer.age.fill_(-20.0)
        threshold, coverage = find_threshold(indexer, seen)
        expectation = find_expectation(indexer, seen)
    indexer.config = dataclasses.replace(config, threshold=threshold, coverage=coverage, expectation=expectation)
    return indexer.eval().requires_grad_(False)


def find_expectation(indexer: MemoryIndexer, seen: Sequence[Seen]) -> Expectation | None:
    """What sets of this indexer cover, on the prompts on which its heads were found, and so rather too good; None where
    there is nothing to cover."""
    layers, heads = zip(*indexer.config.heads, strict=True)
    samples: list[list[Sample]] = []
    for part in seen:
        scores = indexer.combine(part.told[layers, heads]).numpy()
        stay = np.ones(len(scores), dtype=bool)
        stay[free(len(scores))] = False
        samples.append([(scores, part.paid[layers, heads].mean(dim=0).numpy(), stay)])
    try:
        return Expectation.measured(samples, f"the {len(samples)} prompts of the calibration at start")
    except ValueError:
        return None


def find_threshold(indexer: MemoryIndexer, seen: Sequence[Seen], target: float = TARGET) -> tuple[float, float]:
    """The largest score above which pages together get ``target`` of what the heads pay to pages that may be left out,
    and what they get; 0 and 1 where there is nothing to keep. All prompts weigh the same."""
    layers, heads = zip(*indexer.config.heads, strict=True)
    scored: list[tuple[np.ndarray, np.ndarray]] = []
    for part in seen:
        far = free(part.told.shape[2])
        score = indexer.combine(part.told[layers, heads])[far].numpy()
        paid = part.paid[layers, heads].mean(dim=0)[far].numpy()
        if paid.sum() > 0:
            scored.append((score, paid / paid.sum()))
    if not scored:
        return 0.0, 1.0
    candidates = np.unique(np.concatenate([score for score, _ in scored]))
    kept = np.zeros(len(candidates))
    for score, paid in scored:
        order = np.argsort(score)
        below = np.concatenate(([0.0], np.cumsum(paid[order])))
        kept += 1 - below[np.searchsorted(score[order], candidates, side="right")]
    kept /= len(scored)
    good = np.flatnonzero(kept >= target)
    return (float(candidates[good[-1]]), float(kept[good[-1]].clip(0, 1))) if len(good) else (0.0, 1.0)
