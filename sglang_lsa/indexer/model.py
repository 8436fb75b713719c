"""The memory indexer's two towers: what the recent tokens ask for, and what a page offers.

Both read what the model's own retrieval heads read. On a dense model a few heads carry the answer (Wu et al., arXiv
2404.15574), and where they look now tells most of where they will look in the next window; queries and keys of just
these heads, kept at a few keys a page and adapted by training, find pages that bounds over all heads do not.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pathlib
from collections.abc import Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import pad, softplus

from sglang_lsa.config import PAGE_SIZE, RUNS
from sglang_lsa.indexer.checkpoint import IndexerConfig, checkpoint_folder, read_checkpoint_config, write_config
from sglang_lsa.kernels.page_score import Ragged, attention_shares, from_8_bits, page_score, page_scores, to_8_bits
from sglang_lsa.kernels.project_queries import project_queries
from sglang_lsa.kernels.weigh_heads import weigh_heads

AGES = 16
"""Ages of pages that are told apart: 1, 2-3, 4-7, ... pages back."""


def key_runs(keys: torch.Tensor) -> torch.Tensor:
    """What the key tower sees of pages: the mean of every few keys.

    A run of tokens is short enough for its rotary angles to differ little in the slow dimensions, which are the ones
    that carry far attention; in the fast ones the mean is small, which is right too.

    Args:
        keys: ``[pages, page, ..., head_dim]`` post-RoPE.

    Returns:
        ``[pages, RUNS, ..., head_dim]`` float32.
    """
    return keys.float().unflatten(1, (RUNS, PAGE_SIZE // RUNS)).mean(dim=2)


class MemoryIndexer(nn.Module):
    """Scores pages by the attention that a few heads would pay them, as far as a few keys a page can tell.

    Attributes:
        query, key: adapters ``[heads, head_dim, key_dim]`` and ``[key_heads, head_dim, key_dim]``.
        sharpness: logarithm of a factor on each head's logits.
        weight: of each head, before softplus.
        age: what a page is worth for its age alone, before softplus.
        neighbour: what a page is worth for the pages beside it, before softplus.
    """

    def __init__(self, config: IndexerConfig):
        super().__init__()
        self.config = config
        heads, dim = len(config.heads), config.model.head_dim
        kept = slow_dimensions(dim, config.key_dim)
        self.query = nn.Parameter(torch.eye(dim)[:, kept].repeat(heads, 1, 1))
        self.key = nn.Parameter(torch.eye(dim)[:, kept].repeat(len(config.key_heads), 1, 1))
        self.sharpness = nn.Parameter(torch.zeros(heads))
        self.weight = nn.Parameter(torch.zeros(heads))
        self.age = nn.Parameter(torch.full((AGES,), -6.0))
        self.neighbour = nn.Parameter(torch.tensor([-3.0, -4.0]))
        layers, key_heads = config.layers, config.key_heads
        model = config.model
        self._keep("q_at", [layers.index(layer) * model.q_heads + head for layer, head in config.heads])
        self._keep("k_at", [layers.index(layer) * model.kv_heads + head for layer, head in key_heads])
        self._keep("key_of_head", [key_heads.index(config.key_head(head)) for head in config.heads])
        self.all_heads = heads
        """That the mean is over: this one's own, and those that are on other ranks."""

    def of_rank(self, rank: int, ranks: int) -> MemoryIndexer:
        """The part with the heads that one of several ranks has, which shares out query heads evenly.

        KV heads are shared out, too, or repeated where there are fewer than ranks; each query head is on one rank.
        Buffers and parameters are those of :meth:`load`, on the same device.
        """
        if ranks == 1:
            return self
        model, whole = self.config.model, self.config
        q_heads, kv_heads = model.q_heads // ranks, max(1, model.kv_heads // ranks)
        first_q, first_kv = rank * q_heads, rank * model.kv_heads // ranks
        here = [at for at, (_, head) in enumerate(whole.heads) if first_q <= head < first_q + q_heads]
        key_heads = sorted({whole.key_head(whole.heads[at]) for at in here})
        keys_here = [whole.key_heads.index(head) for head in key_heads]
        part = copy.copy(self)
        part._parameters, part._buffers = dict(self._parameters), dict(self._buffers)
        for name, kept in (("query", here), ("sharpness", here), ("weight", here), ("key", keys_here)):
            setattr(part, name, nn.Parameter(getattr(self, name)[kept], requires_grad=False))
        layers = whole.layers
        numbers = {
            "q_at": [layers.index(whole.heads[at][0]) * q_heads + whole.heads[at][1] - first_q for at in here],
            "k_at": [layers.index(layer) * kv_heads + head - first_kv for layer, head in key_heads],
            "key_of_head": [key_heads.index(whole.key_head(whole.heads[at])) for at in here],
        }
        for name, values in numbers.items():
            part._keep(name, torch.tensor(values, dtype=torch.int64, device=self.q_at.device))
        return part

    def _keep(self, name: str, numbers: list[int] | torch.Tensor) -> None:
        """On the indexer's device: an index that comes from the host would be copied there every time."""
        self.register_buffer(name, torch.as_tensor(numbers), persistent=False)

    @classmethod
    def load(cls, path: str | pathlib.Path) -> MemoryIndexer:
        """Load a checkpoint folder, or a shipped indexer by its name.

        Raises:
            ValueError: the folder is incomplete, its configuration is impossible, or its weights do not fit that or
                are no numbers.
        """
        indexer = cls(read_checkpoint_config(path))
        try:
            indexer.load_state_dict(load_file(checkpoint_folder(path) / "model.safetensors"))
        except Exception as error:
            raise ValueError(f"--lsa-indexer {path}: model.safetensors does not fit config.json ({error})") from None
        for name, value in indexer.named_parameters():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"--lsa-indexer {path}: model.safetensors has values in {name} that are no numbers: train again"
                )
        return indexer.eval().requires_grad_(False)

    def save(self, path: str | pathlib.Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, which :meth:`load` reads."""
        folder = pathlib.Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, self.config)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / "model.safetensors")

    def ask(self, queries: torch.Tensor) -> torch.Tensor:
        """``[positions, layers, q_heads, head_dim]`` -> ``[heads, positions, key_dim]``, scaled."""
        chosen = queries.flatten(1, 2).index_select(1, self.q_at).transpose(0, 1).float()
        return chosen @ self.scaled_query

    @property
    def scaled_query(self) -> torch.Tensor:
        """The query adapter with the softmax scale in it, ``[heads, head_dim, key_dim]``."""
        scale = self.config.model.head_dim**-0.5 * self.sharpness.exp()
        return self.query * scale[:, None, None]

    def page_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """``[pages, page, layers, kv_heads, head_dim]`` -> ``[pages, key_heads, sub_keys, key_dim]``."""
        return self.keys_of_runs(key_runs(keys))

    def keys_of_runs(self, runs: torch.Tensor) -> torch.Tensor:
        """``[pages, RUNS, layers, kv_heads, head_dim]`` of :func:`key_runs` -> ``[pages, key_heads, sub_keys,
        key_dim]``, rounded as they are kept; gradients pass as if they were not."""
        sub_keys = self.config.sub_keys
        chosen = runs.flatten(2, 3).index_select(2, self.k_at).float()
        keys = chosen.unflatten(1, (sub_keys, RUNS // sub_keys)).mean(dim=2).transpose(1, 2) @ self.key
        return keys + (from_8_bits(to_8_bits(keys.detach())) - keys.detach())

    def score(self, queries: torch.Tensor, table: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """What share of their attention the heads are expected to pay to each page in the next window.

        Args: as for :meth:`score_part`.

        Returns:
            ``[n]`` float32, 0 or more.
        """
        return self.finish(self.score_part(queries, table, pages))

    def score_part(self, queries: torch.Tensor, table: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """What the heads of this rank add to that; parts of all ranks are added up before :meth:`finish`.

        Args:
            queries: ``[positions, layers, q_heads, head_dim]`` of the recent positions, in any order.
            table: uint8 ``[virtual_pages + 1, key_heads, sub_keys, key_dim]``, see ``page_score``.
            pages: int64 ``[n]`` virtual ids of the request's complete pages, first to last.

        Returns:
            ``[n]`` float32.
        """
        if not len(self.q_at):
            return torch.zeros(len(pages), device=table.device)
        asked = self.ask(queries)
        if table.is_cuda:
            asked = asked.bfloat16()  # for matrix units; keys are numbers of this type
        return self.part(page_score(asked, table, pages, self.key_of_head, self.config.overlap))

    def score_parts(self, ring: torch.Tensor, table: torch.Tensor, asked: Ragged) -> torch.Tensor:
        """:meth:`score_part` of several requests in one call: each gets what it would get alone, bit for bit.

        Args:
            ring: ``[rows, places, layers, q_heads, head_dim]`` recent queries of each row.
            table: as for :meth:`score_part`.
            asked: the requests, their places in the ring and their pages.

        Returns:
            ``[n]`` float32, one request after the other.
        """
        if not len(self.q_at):
            return torch.zeros(len(asked.pages), device=table.device)
        if not table.is_cuda:
            every = range(len(asked))
            return torch.cat([self.score_part(asked.recent(ring, i), table, asked.pages_of(i)) for i in every])
        return self.score_by_kernels(ring, table, asked)

    def score_by_kernels(self, ring: torch.Tensor, table: torch.Tensor, asked: Ragged) -> torch.Tensor:
        """:meth:`score_parts`, of as many requests at a time as there is memory for what they ask."""
        query_bytes = len(self.q_at) * ring.shape[1] * self.config.key_dim * (4 + 2)  # float32, and bfloat16 made of it
        found = []
        for some in asked.within(query_bytes):
            queries = project_queries(ring, some, self.q_at, self.scaled_query).bfloat16()
            shares = page_scores(queries, table, some, self.key_of_head, self.config.overlap)
            found.append(weigh_heads(shares, softplus(self.weight), math.log(2) * self.all_heads))
        return torch.cat(found)

    def score_all(self, asked: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The same for training: ``asked`` of :meth:`ask`, ``keys [pages, key_heads, sub_keys, key_dim]``."""
        logits = torch.einsum("htd,nhsd->htns", asked, keys[:, self.key_of_head])
        return self.combine(attention_shares(logits, self.config.overlap))

    def combine(self, shares: torch.Tensor) -> torch.Tensor:
        """``[heads, pages]`` -> ``[pages]``: the mean over heads, and what age and neighbours add."""
        return self.finish(self.part(shares))

    def part(self, shares: torch.Tensor) -> torch.Tensor:
        """``[heads, pages]`` -> ``[pages]``: what these heads add to the mean over all heads."""
        return softplus(self.weight) @ shares / (math.log(2) * self.all_heads)  # softplus(0) weighs 1

    def finish(self, own: torch.Tensor) -> torch.Tensor:
        """``[pages]``, the mean over all heads, and what age and neighbours add."""
        before, after = softplus(self.neighbour)
        own = own + before * pad(own[:-1], (1, 0)) + after * pad(own[1:], (0, 1))
        return own + softplus(self.age)[ages(len(own), own.device)]

    def finish_all(self, own: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """:meth:`finish` of several requests, of so many pages each, one after the other.

        The same sums in the same order: a page at an end has a neighbour that is worth nothing.
        """
        if len(sizes) == 1 or not len(own):
            return self.finish(own)
        before, after = softplus(self.neighbour)
        ends = itertools.accumulate(sizes)
        parts = [own[end - size : end] for end, size in zip(ends, sizes, strict=True) if size]
        nothing = own.new_zeros(1)
        earlier = torch.cat([piece for part in parts for piece in (nothing, part[:-1])])
        later = torch.cat([piece for part in parts for piece in (part[1:], nothing)])
        own = own + before * earlier + after * later
        longest = ages(max(sizes), own.device)
        return own + softplus(self.age)[torch.cat([longest[len(longest) - size :] for size in sizes])]


@functools.lru_cache(maxsize=64)
def ages(pages: int, device: torch.device) -> torch.Tensor:
    """Class of age of each of ``pages`` pages, first to last, int64."""
    return torch.arange(pages, 0, -1, device=device).float().log2().long().clamp(max=AGES - 1)


def slow_dimensions(head_dim: int, count: int) -> list[int]:
    """Dimensions that rotary embedding turns least; the halves of a head are rotated together. ``count`` is even."""
    half, kept = head_dim // 2, count // 2
    return [*range(half - kept, half), *range(head_dim - kept, head_dim)]
