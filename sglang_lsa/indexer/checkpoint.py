"""Indexer checkpoints: a folder with ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from dataclasses import dataclass


@dataclass(frozen=True)
class IndexerConfig:
    """What an indexer was built for and how large it is.

    Attributes:
        hidden_size, num_hidden_layers: of the model whose hidden states it reads.
        layers: decoder layers that it observes.
        rank: of the query tower's low-rank projection.
        heads, head_dim: of the query tower.
        sub_keys: keys that represent one page.
    """

    hidden_size: int
    num_hidden_layers: int
    layers: tuple[int, ...]
    rank: int = 128
    heads: int = 8
    head_dim: int = 128
    sub_keys: int = 4

    def require_model(self, hidden_size: int, num_hidden_layers: int) -> None:
        """Raise ValueError unless the served model is the one that this indexer was trained for."""
        if (hidden_size, num_hidden_layers) != (self.hidden_size, self.num_hidden_layers):
            raise ValueError(
                f"--lsa-indexer was trained for a model with {self.num_hidden_layers} layers of width "
                f"{self.hidden_size}; this model has {num_hidden_layers} of {hidden_size}: "
                "give the indexer that belongs to this model"
            )


def read_checkpoint_config(path: str | pathlib.Path) -> IndexerConfig:
    """Read ``config.json`` of a checkpoint folder, without loading weights.

    Raises:
        ValueError: the folder is missing or incomplete, or the file is no indexer configuration.
    """
    folder = pathlib.Path(path)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"--lsa-indexer {folder}: has no {name}: give a folder written by sglang-lsa train")
    try:
        values = json.loads((folder / "config.json").read_text())
        known = {field.name for field in dataclasses.fields(IndexerConfig)}
        return IndexerConfig(**{**{k: v for k, v in values.items() if k in known}, "layers": tuple(values["layers"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"--lsa-indexer {folder}: config.json is no indexer configuration ({error!r})") from None
