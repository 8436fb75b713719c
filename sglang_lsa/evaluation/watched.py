"""Prompts computed by a model of ``transformers`` whose attention is watched: any model and device, no server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sglang_lsa.indexer.watch import Seen, Watch
from sglang_lsa.texts.corpus import Tokens

ATTENTION = "lsa_watched"
_watching: list[Watch] = []


def _attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> tuple[Any, None]:
    """As ``transformers`` calls attention: ``[1, heads, tokens, head_dim]``."""
    queries, keys, values = (part[0].transpose(0, 1) for part in (query, key, value))
    return _watching[-1].attend(module.layer_idx, queries, keys, values, scaling)[None], None


def load(path: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A causal model with the attention that watches itself."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register(ATTENTION, _attend)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION).to(device).eval()


@torch.no_grad()
def watched(model: Any, prompts: Sequence[Tokens], **options: Any) -> Iterator[Seen]:
    """What each prompt showed; ``options`` are those of :class:`Watch`."""
    for prompt in prompts:
        _watching.append(Watch(len(prompt.ids), prompt.answer, prompt.evidence, **options))
        try:
            model.model(torch.tensor([prompt.ids], device=model.device), use_cache=False)
            yield _watching[-1].seen()
        finally:
            _watching.pop()
