"""The memory indexer's two towers: what a request asks for, and what a page offers."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import rms_norm

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.indexer.checkpoint import IndexerConfig, read_checkpoint_config
from sglang_lsa.indexer.recording import RUNS
from sglang_lsa.kernels.page_score import page_score


class QueryTower(nn.Module):
    """Hidden state -> low rank -> RMSNorm -> heads of queries, and a weight for each head."""

    def __init__(self, config: IndexerConfig):
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.down = nn.Linear(config.hidden_size, config.rank, bias=False)
        self.norm = nn.RMSNorm(config.rank, eps=1e-6)
        self.up = nn.Linear(config.rank, config.heads * config.head_dim, bias=False)
        self.weights = nn.Linear(config.hidden_size, config.heads, bias=False)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[..., hidden]`` -> queries ``[..., heads, head_dim]`` and weights ``[..., heads]``."""
        hidden = rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)  # late layers have far larger states
        queries = self.up(self.norm(self.down(hidden))).unflatten(-1, (self.heads, self.head_dim))
        return queries, self.weights(hidden) * (self.heads * self.head_dim) ** -0.5


def page_runs(hidden: torch.Tensor) -> torch.Tensor:
    """What the key towers see of pages: the mean of every few RMS-normalised hidden states.

    Args:
        hidden: ``[pages, page, ..., hidden]``.

    Returns:
        ``[pages, RUNS, ..., hidden]`` float32.
    """
    normed = rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)
    return normed.unflatten(1, (RUNS, PAGE_SIZE // RUNS)).mean(dim=2)


class KeyTower(nn.Module):
    """What a page shows -> ``sub_keys`` keys, each from an equal run of its tokens."""

    def __init__(self, config: IndexerConfig):
        super().__init__()
        self.sub_keys = config.sub_keys
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.project = nn.Linear(config.hidden_size, config.head_dim, bias=False)

    def forward(self, runs: torch.Tensor) -> torch.Tensor:
        """``[..., RUNS, hidden]`` of :func:`page_runs` -> ``[..., sub_keys, head_dim]``."""
        grouped = runs.unflatten(-2, (self.sub_keys, RUNS // self.sub_keys)).mean(dim=-2)
        return self.project(grouped * self.weight)


class MemoryIndexer(nn.Module):
    """One pair of towers per observed layer; the best layer decides."""

    def __init__(self, config: IndexerConfig):
        super().__init__()
        self.config = config
        self.query = nn.ModuleList(QueryTower(config) for _ in config.layers)
        self.key = nn.ModuleList(KeyTower(config) for _ in config.layers)
        self.bias = nn.Parameter(torch.zeros(len(config.layers)))
        """Added to the logits of each layer."""

    @classmethod
    def load(cls, path: str | pathlib.Path) -> MemoryIndexer:
        """Load a checkpoint folder.

        Raises:
            ValueError: the folder is incomplete, or its weights do not fit its configuration.
        """
        indexer = cls(read_checkpoint_config(path))
        try:
            indexer.load_state_dict(load_file(pathlib.Path(path) / "model.safetensors"))
        except Exception as error:
            raise ValueError(f"--lsa-indexer {path}: model.safetensors does not fit config.json ({error})") from None
        return indexer.eval().requires_grad_(False)

    def save(self, path: str | pathlib.Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, which :meth:`load` reads."""
        folder = pathlib.Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=1) + "\n")
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / "model.safetensors")

    def page_keys(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[pages, page, layers, hidden]`` -> ``[pages, layers, sub_keys, head_dim]``."""
        return self.keys_of_runs(page_runs(hidden).transpose(1, 2))

    def keys_of_runs(self, runs: torch.Tensor) -> torch.Tensor:
        """``[pages, layers, RUNS, hidden]`` of :func:`page_runs` -> ``[pages, layers, sub_keys, head_dim]``."""
        return torch.stack([tower(runs[:, i].float()) for i, tower in enumerate(self.key)], dim=1)

    def score(self, hidden: torch.Tensor, page_keys: torch.Tensor) -> torch.Tensor:
        """Probability that a page is needed in the next window.

        Args:
            hidden: ``[positions, layers, hidden]`` of the recent positions.
            page_keys: ``[pages, layers, sub_keys, head_dim]``.

        Returns:
            ``[pages]`` float32 in [0, 1].
        """
        logits = []
        for layer, tower in enumerate(self.query):
            queries, weights = tower(hidden[:, layer].float())
            logits.append(page_score(queries, weights, page_keys[:, layer]) + self.bias[layer])
        return torch.stack(logits).amax(dim=0).sigmoid()
