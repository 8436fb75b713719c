"""Full attention that watches itself: what every head pays to pages while a known answer is read, and what its queries
before the answer would have told of that.

Calibration and its evaluation compute prompts with it in place of a model's attention. No KV is kept: a prompt is one
pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_lsa.config import PAGE_SIZE, RUNS
from sglang_lsa.indexer.model import key_runs, slow_dimensions
from sglang_lsa.kernels.attention_mass import attention_mass
from sglang_lsa.kernels.bound_score import bound_score
from sglang_lsa.kernels.page_score import page_score, to_8_bits


@dataclass(frozen=True)
class Sees:
    """What of a prompt tells which pages matter, as in ``IndexerConfig``.

    Attributes:
        positions: before the answer whose queries vote.
        sub_keys: of a page.
        overlap: of these, those at a page's end that count for the page after it, too.
    """

    positions: int
    sub_keys: int
    overlap: int


@dataclass(frozen=True)
class Seen:
    """What one prompt showed, of its complete pages before the answer.

    Attributes:
        paid: float32 ``[layers, q_heads, pages]``, the most of its attention that a head paid in any token of the
            answer.
        told: what the queries before the answer and a few keys a page tell of that, see ``page_score``.
        evidence: pages that the answer is from, ascending; those of them that are complete.
        quest: float32 ``[pages]``; None unless asked for.
        queries: by layer ``[positions, q_heads, head_dim]`` before the answer, of layers that are kept.
        runs: by layer ``[pages, RUNS, kv_heads, head_dim]``, of the same layers.
    """

    paid: torch.Tensor
    told: torch.Tensor
    evidence: tuple[int, ...]
    quest: torch.Tensor | None = None
    queries: dict[int, torch.Tensor] = field(default_factory=dict)
    runs: dict[int, torch.Tensor] = field(default_factory=dict)


class Watch:
    """One prompt, layer by layer.

    Args:
        tokens: of the prompt and its answer.
        answer: last ones of them that are the answer.
        evidence: pages that it is from.
        sees: what tells which pages matter.
        key_dim: dimensions of keys that are looked at, see ``IndexerConfig``; 0 keeps all.
        quest_layers: whose bounds are scored as Quest does.
        quest_positions: whose queries vote there.
        keep: layers whose queries and keys are kept.
    """

    def __init__(
        self,
        tokens: int,
        answer: int,
        evidence: Sequence[int],
        sees: Sees,
        *,
        key_dim: int = 0,
        quest_layers: Sequence[int] = (),
        quest_positions: int = 32,
        keep: Sequence[int] = (),
    ):
        self.tokens, self.begins, self.evidence = tokens, tokens - answer, tuple(evidence)
        self.sees, self.key_dim = sees, key_dim
        self.quest_layers, self.quest_positions, self.keep = tuple(quest_layers), quest_positions, frozenset(keep)
        self.pages = self.begins // PAGE_SIZE
        self._paid: dict[int, torch.Tensor] = {}
        self._told: dict[int, torch.Tensor] = {}
        self._asked: dict[int, torch.Tensor] = {}
        self._bounds: dict[int, torch.Tensor] = {}
        self._queries: dict[int, torch.Tensor] = {}
        self._runs: dict[int, torch.Tensor] = {}
        self._scale = 1.0

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Causal attention over the whole prompt.

        Args:
            queries: ``[tokens, q_heads, head_dim]``, post-RoPE.
            keys, values: ``[tokens, kv_heads, head_dim]``.
            scale: of the softmax.

        Returns:
            ``[tokens, q_heads, head_dim of values]``.
        """
        self._look(layer, queries, keys, scale)
        q, k, v = (part.transpose(0, 1)[None] for part in (queries, keys, values))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    def _look(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, scale: float) -> None:
        at = torch.arange(self.tokens, device=keys.device)
        mass = attention_mass(queries[self.begins :], keys.contiguous(), at, at[self.begins :], scale, PAGE_SIZE)
        self._paid[layer] = mass[:, :, : self.pages].amax(dim=0)
        complete = keys[: self.pages * PAGE_SIZE].unflatten(0, (self.pages, PAGE_SIZE))
        runs = key_runs(complete)
        recent = queries[max(0, self.begins - self.sees.positions) : self.begins]
        self._told[layer] = told(recent, runs, scale, self.sees, self.key_dim)
        if layer in self.quest_layers:
            self._asked[layer] = queries[self.begins - self.quest_positions : self.begins]
            self._bounds[layer] = torch.stack((complete.amin(dim=1), complete.amax(dim=1)), dim=1)
            self._scale = scale
        if layer in self.keep:
            self._queries[layer], self._runs[layer] = recent.cpu(), runs.to(keys.dtype).cpu()

    def seen(self) -> Seen:
        """What all layers showed."""
        layers = sorted(self._paid)
        paid, estimate = (torch.stack([of[layer] for layer in layers]).cpu() for of in (self._paid, self._told))
        evidence = tuple(page for page in self.evidence if page < self.pages)
        return Seen(paid, estimate, evidence, self._quest(), self._queries, self._runs)

    def _quest(self) -> torch.Tensor | None:
        if not self._asked:
            return None
        queries = torch.stack([self._asked[layer] for layer in self.quest_layers], dim=1)
        bounds = torch.stack([self._bounds[layer] for layer in self.quest_layers], dim=1)
        pages = torch.arange(self.pages, device=bounds.device)
        return bound_score(queries, bounds.contiguous(), pages, self._scale).cpu()


def told(queries: torch.Tensor, runs: torch.Tensor, scale: float, sees: Sees, key_dim: int) -> torch.Tensor:
    """The largest share that any position's query gives each page, of every head, as an untrained indexer has it.

    Args:
        queries: ``[positions, q_heads, head_dim]``.
        runs: ``[pages, RUNS, kv_heads, head_dim]`` of ``key_runs``.
        sees, key_dim: as for :class:`Watch`.

    Returns:
        float32 ``[q_heads, pages]``.
    """
    q_heads, kv_heads, dim = queries.shape[1], runs.shape[2], queries.shape[2]
    kept = slow_dimensions(dim, key_dim or dim)
    keys = runs[..., kept].unflatten(1, (sees.sub_keys, RUNS // sees.sub_keys)).mean(dim=2).transpose(1, 2)
    asked = (queries[..., kept].float() * scale).transpose(0, 1)
    pages = torch.arange(len(runs), device=runs.device)
    of_head = torch.arange(q_heads, device=runs.device) * kv_heads // q_heads
    if asked.is_cuda:
        asked = asked.bfloat16()
    return page_score(asked.contiguous(), to_8_bits(keys).contiguous(), pages, of_head, sees.overlap)
