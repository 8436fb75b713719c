"""What attention shows to the runtime on a GPU, whichever kernels compute it: queries, layers, and what it attended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_lsa.engine.observe import recent_tokens
from sglang_lsa.memory.transfer import upload

if TYPE_CHECKING:
    from sglang_lsa.engine.runtime import LSARuntime


class Shown:
    """Held by an attention backend, which calls it in this order: ``plan``, then for each layer one of the others.

    Args:
        lsa: of the model runner.
    """

    def __init__(self, lsa: LSARuntime):
        self.lsa = lsa
        self.recent: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        """Of the last tokens of each request of a prefill pass: place in the batch, row, position."""

    def plan(self, forward_batch) -> bool:
        """Look up which queries of this pass are kept; whether its prompts read only a part of their prefix."""
        self.recent = None
        if not forward_batch.forward_mode.is_extend() or forward_batch.extend_seq_lens_cpu is None:
            return False
        tokens, owners = recent_tokens(list(forward_batch.extend_seq_lens_cpu), self.lsa.observer.positions)
        ids = upload(np.stack((tokens, owners)), self.lsa.pager.device)
        rows = forward_batch.req_pool_indices[ids[1]]
        self.recent = ids[0], rows, forward_batch.positions[ids[0]]
        return self.lsa.step.readings is not None

    def extend(self, q: torch.Tensor, layer) -> bool:
        """A prefill pass is about to attend in ``layer``; whether to a part of the prefix only.

        Args:
            q: ``[tokens, q_heads * head_dim]``, or with heads apart.
        """
        if self.recent is not None and layer.layer_id in self.lsa.observer.slot_of_layer:
            tokens, rows, positions = self.recent
            self.lsa.observer.observe(layer.layer_id, _heads(q, layer)[tokens], rows, positions)
        self.lsa.prefill.before_layer(layer.layer_id)
        return self.recent is not None and self.lsa.step.readings is not None

    def decode(self, q: torch.Tensor, layer, forward_batch) -> None:
        """A decode step is about to attend in ``layer``."""
        if layer.layer_id in self.lsa.observer.slot_of_layer:
            rows, positions = forward_batch.req_pool_indices, forward_batch.positions
            self.lsa.observer.observe(layer.layer_id, _heads(q, layer), rows, positions)

    def attended(self, q: torch.Tensor, layer) -> None:
        """Attention over all that is in place was queued."""
        if self.lsa.recorder is not None:
            self.lsa.recorder.observe(layer.layer_id, _heads(q, layer))


def _heads(q: torch.Tensor, layer) -> torch.Tensor:
    return q.view(-1, layer.tp_q_head_num, layer.head_dim)
