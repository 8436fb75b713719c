"""page_score: how much the next tokens are expected to attend to each page."""

from __future__ import annotations

import torch


def bound_score(queries: torch.Tensor, bounds: torch.Tensor, scale: float) -> torch.Tensor:
    """Score pages by Quest's upper bound on their attention logits, the best vote of any head counting.

    For every query the bound of a page is ``sum_d max(q_d * min_d, q_d * max_d)``, the largest logit that any key
    inside the page's box could have. Bounds are normalised over pages with a softmax, so that heads of different
    scale can be compared, and a page's score is its maximum over positions, layers and heads: on a dense model a few
    retrieval heads carry the answer, and an average would lose them.

    Args:
        queries: ``[positions, layers, q_heads, head_dim]``, post-RoPE, the recent positions of one request.
        bounds: ``[pages, layers, 2, kv_heads, head_dim]`` from :func:`sglang_lsa.kernels.page_keys.key_bounds`.
        scale: the model's softmax scale.

    Returns:
        ``[pages]`` float32 in [0, 1].

    Raises:
        ValueError: the heads of queries and keys do not fit.
    """
    positions, layers, q_heads, head_dim = queries.shape
    pages, _, _, kv_heads, _ = bounds.shape
    if q_heads % kv_heads or bounds.shape[1] != layers or bounds.shape[4] != head_dim:
        raise ValueError(f"queries {tuple(queries.shape)} do not fit key bounds {tuple(bounds.shape)}")
    if positions == 0 or pages == 0:
        return torch.zeros(pages, dtype=torch.float32, device=bounds.device)
    q = queries.float().view(positions, layers, kv_heads, q_heads // kv_heads, head_dim)
    low, high = bounds.float().unbind(dim=2)  # [pages, layers, kv_heads, head_dim]
    # max(q * low, q * high) is q+ * high + q- * low, which is two matrix products.
    logits = torch.einsum("tlkgd,plkd->tlkgp", q.clamp(min=0), high)
    logits += torch.einsum("tlkgd,plkd->tlkgp", q.clamp(max=0), low)
    return (logits * scale).softmax(dim=-1).amax(dim=(0, 1, 2, 3))


def page_score(queries: torch.Tensor, weights: torch.Tensor, page_keys: torch.Tensor) -> torch.Tensor:
    """Logits of the memory indexer for one observed layer.

    ``logit[p] = max over positions t and sub-keys s of sum_h weights[t, h] * relu(queries[t, h] . page_keys[p, s])``.

    Args:
        queries: ``[positions, heads, dim]`` from the query tower.
        weights: ``[positions, heads]`` per-head weights from the same tower.
        page_keys: ``[pages, sub_keys, dim]`` from the key tower.

    Returns:
        ``[pages]`` float32; all -inf when there are no positions.

    Source: arXiv 2606.09079, section 3 (a chunk there has one key; here a page has several).
    """
    pages, _, dim = page_keys.shape
    if queries.shape[-1] != dim:
        raise ValueError(f"queries {tuple(queries.shape)} do not fit page keys {tuple(page_keys.shape)}")
    if not pages or not len(queries):
        return torch.full((pages,), float("-inf"), device=page_keys.device)
    products = torch.einsum("thd,psd->tpsh", queries.float(), page_keys.float()).relu_()
    return torch.einsum("tpsh,th->tps", products, weights.float()).amax(dim=(0, 2))
