"""Beside the policies of an LSA server that look at DeepSeek-V4's own index: what they should have seen, and said.

Part of ``dsv4_plugin`` (``DSV4_TEST_SCORES``, a file of JSON lines), for a server without CUDA graphs. Whenever a
policy scores pages, these are compared and one line is written:

- what it finds in the observer's rings, with what entered the index in SGLang's own method;
- the index keys that it looks at, with the pages' copies in host memory;
- its scores, with those of torch on the same device, and with those in float64;
- and, when a set is chosen by them, with the set that torch's scores give.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

KEPT = 64
"""Last tokens of each request in a pass of which is noted what entered the index."""


class Witness:
    def __init__(self, path: pathlib.Path):
        self.path = path
        self.pager: Any = None
        self.entered: dict[tuple[int, int, int], torch.Tensor] = {}
        """By layer, row and position, hidden states."""
        self.asked: dict[tuple[int, int, int], torch.Tensor] = {}
        """The same, bytes of index queries."""
        self.tokens: list[tuple[int, int, int]] = []
        """Of the pass: row, position, place."""
        self.expected: dict[str, np.ndarray] = {}
        """By policy, torch's scores of the pages that were scored last."""

    def note(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def begin(self, positions: torch.Tensor, batch: Any) -> None:
        rows = batch.req_pool_indices.tolist()
        counts = [1] * len(rows) if batch.forward_mode.is_decode() else list(batch.extend_seq_lens_cpu)
        places, self.tokens, first = positions.tolist(), [], 0
        for row, count in zip(rows, counts, strict=True):
            self.tokens += [(row, places[at], at) for at in range(first + max(0, count - KEPT), first + count)]
            first += count

    def keep(self, into: dict[tuple[int, int, int], torch.Tensor], layer: int, values: torch.Tensor) -> None:
        for row, position, at in self.tokens:
            into[layer, row, position] = values[at].clone()

    def look(self, policy: Any, request: Any, pages: np.ndarray, seen: torch.Tensor) -> None:
        if seen.is_cuda:
            torch.cuda.synchronize()
        at = policy.observer.recent(request.first_observed, request.tokens)
        ids = torch.from_numpy(pages)
        score, kept, ring = self._of(policy, request.row, at, ids.to(seen.device))
        places = [
            (layer, slot, n, int(position)) for layer, slot in self._slots(policy) for n, position in enumerate(at)
        ]
        noted = [kept.get((layer, request.row, position)) for layer, _, _, position in places]
        same = [
            torch.equal(was, ring[n, slot].flatten())
            for was, (_, slot, n, _) in zip(noted, places, strict=True)
            if was is not None
        ]
        keys = [
            torch.equal(policy.keys.tables[slot][ids.to(seen.device)].cpu(), self._in_host_memory(layer, ids))
            for layer, slot in self._slots(policy)
        ]
        torchs, exact = score(None), score(torch.float64)
        self.expected[policy.name] = torchs.double().cpu().numpy()
        far = (seen - torchs).abs() > 1e-3 * torchs.abs().clamp(min=1e-6)
        most = max(1, len(pages) * 3 // 10)
        best, best_exact = (set(values.topk(most).indices.tolist()) for values in (seen, exact))
        self.note(
            policy=policy.name,
            rid=request.rid,
            pages=len(pages),
            positions=len(at),
            inputs=all(same),
            missing=sum(was is None for was in noted),
            keys=all(keys),
            far=float(far.float().mean()),
            best_shared=len(best & best_exact) / most,
        )

    def _slots(self, policy: Any) -> list[tuple[int, int]]:
        return list(policy.observer.slot_of_layer.items())

    def _in_host_memory(self, layer: int, ids: torch.Tensor) -> torch.Tensor:
        _, index = self.pager.layout.by_layer[layer]
        return self.pager.mirror.pages[ids, index.offset : index.offset + index.nbytes]

    def _of(
        self, policy: Any, row: int, at: torch.Tensor, ids: torch.Tensor
    ) -> tuple[Callable[[torch.dtype | None], torch.Tensor], dict[tuple[int, int, int], torch.Tensor], torch.Tensor]:
        """Scores by torch in a type (that of the policy by default), what was noted, and what is in the ring."""
        from sglang_lsa.engine.policies.native import shares
        from sglang_lsa.engine.policies.retriever import NEEDED, worth
        from sglang_lsa.kernels.retriever_score_paged import retriever_score_paged_reference as reference

        tables = policy.keys.tables
        if policy.name == "native":
            queries, weights = policy.observer.queries(row, at)

            def native(dtype: torch.dtype | None) -> torch.Tensor:
                asked = queries if dtype is None else queries.view(torch.float8_e4m3fn).to(dtype)
                return shares(
                    torch.cat([reference(asked[:, n], weights[:, n], table, ids)[0] for n, table in enumerate(tables)])
                )

            return native, self.asked, queries
        hidden = policy.observer.hidden(row, at)

        def retriever(dtype: torch.dtype | None) -> torch.Tensor:
            found = torch.zeros(len(ids), device=ids.device, dtype=dtype)
            for n, (layer, table) in enumerate(zip(policy.layers, tables, strict=True)):
                best, needed = reference(*layer(hidden[:, n].to(dtype or hidden.dtype), at), table, ids, NEEDED)
                found = torch.maximum(found, worth(best, needed).amax(dim=0).to(found.dtype))
            return found

        return retriever, self.entered, hidden


def watch(path: pathlib.Path) -> None:
    """Put a witness in place."""
    from sglang.srt.layers.attention.dsv4.indexer import C4Indexer, C4IndexerBackendMixin

    from sglang_lsa.engine import chooser
    from sglang_lsa.engine.policies import Native, Retriever
    from sglang_lsa.memory.pager import Pager

    witness = Witness(path)
    forward, compute, make, choose_all = (
        C4IndexerBackendMixin.forward_c4_indexer,
        C4Indexer.compute_q,
        Pager.__init__,
        chooser.choose_all,
    )

    def forward_c4_indexer(self, x, q_lora, c4_indexer, forward_batch, **options):
        witness.begin(self.forward_metadata.core_metadata.positions, forward_batch)
        witness.keep(witness.entered, c4_indexer.layer_id, x)
        return forward(self, x=x, q_lora=q_lora, c4_indexer=c4_indexer, forward_batch=forward_batch, **options)

    def compute_q(self, *given, **options):
        q, weights = compute(self, *given, **options)
        witness.keep(witness.asked, self.layer_id, q.contiguous().view(torch.uint8).flatten(1))
        return q, weights

    def init(self, *given, **options):
        make(self, *given, **options)
        witness.pager = self

    def chosen(rules, asks):
        every = choose_all(rules, asks)
        for ask, found in zip(asks, every, strict=True):
            expected = witness.expected.get(ask.policy)
            if expected is not None and len(expected) == len(ask.scores):
                other = dataclasses.replace(ask, scores=expected).alone(rules)
                shared = len(np.intersect1d(found.positions, other.positions))
                witness.note(policy=ask.policy, set=len(found.positions), shared=shared)
        return every

    C4IndexerBackendMixin.forward_c4_indexer = forward_c4_indexer
    C4Indexer.compute_q = compute_q
    Pager.__init__ = init
    chooser.choose_all = chosen
    for kind in (Native, Retriever):
        _watch_policy(kind, witness)


def _watch_policy(kind: Any, witness: Witness) -> None:
    score = kind.score

    def scored(self, request, pages):
        seen = score(self, request, pages)
        if request.rid and len(pages):  # neither a warm-up
            witness.look(self, request, pages, seen)
        return seen

    kind.score = scored
