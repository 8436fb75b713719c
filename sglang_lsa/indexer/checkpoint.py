"""Indexer checkpoints: a folder with ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from dataclasses import dataclass
from typing import Any

SHIPPED = pathlib.Path(__file__).parent / "shipped"
"""Trained indexers that come with the package, each a folder named after its model."""


@dataclass(frozen=True)
class ModelShape:
    """What of a model an indexer depends on."""

    hidden_size: int
    num_hidden_layers: int
    q_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class IndexerConfig:
    """What an indexer was built for and how large it is.

    Attributes:
        model: that it was trained for.
        heads: (layer, query head) of the heads whose queries it reads, by layer.
        sub_keys: keys that represent one page, each from an equal run of its tokens.
        key_dim: of queries and keys.
        positions: recent tokens that vote.
        threshold: score above which pages are worth keeping; found on data not trained on, see ``training.calibrate``.
        coverage: share of the attention that was kept at that threshold, on the same data.
    """

    model: ModelShape
    heads: tuple[tuple[int, int], ...]
    sub_keys: int = 32
    key_dim: int = 32
    positions: int = 64
    threshold: float = 0.0
    coverage: float = 1.0

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers of its heads, ascending."""
        return tuple(sorted({layer for layer, _ in self.heads}))

    @property
    def key_heads(self) -> tuple[tuple[int, int], ...]:
        """(layer, KV head) of the keys that its heads look at, ascending."""
        return tuple(sorted({self.key_head(head) for head in self.heads}))

    def key_head(self, head: tuple[int, int]) -> tuple[int, int]:
        """The keys that a query head looks at."""
        return head[0], head[1] * self.model.kv_heads // self.model.q_heads

    @property
    def page_bytes(self) -> int:
        """Of the keys of one page, in 8 bits."""
        return len(self.key_heads) * self.sub_keys * self.key_dim

    def require_model(self, shape: ModelShape) -> None:
        """Raise ValueError unless the served model is the one that this indexer was trained for."""
        if shape != self.model:
            raise ValueError(
                f"--lsa-indexer was trained for a model of {self.model}; this one is of {shape}: "
                "give the indexer that belongs to this model"
            )


def shipped_indexers() -> list[str]:
    """Names of the indexers that come with the package."""
    return sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir()) if SHIPPED.is_dir() else []


def checkpoint_folder(path: str | pathlib.Path) -> pathlib.Path:
    """The folder of a checkpoint: ``path``, or the shipped indexer of that name."""
    own = pathlib.Path(path)
    return SHIPPED / own if not own.exists() and str(path) in shipped_indexers() else own


def read_checkpoint_config(path: str | pathlib.Path) -> IndexerConfig:
    """Read ``config.json`` of a checkpoint folder or shipped indexer, without loading weights.

    Raises:
        ValueError: the folder is missing or incomplete, or the file is no indexer configuration.
    """
    folder = checkpoint_folder(path)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            known = f", or one of {', '.join(names)}" if (names := shipped_indexers()) else ""
            raise ValueError(f"--lsa-indexer {folder}: has no {name}: give a folder written by sglang-lsa train{known}")
    try:
        return config_from_json(json.loads((folder / "config.json").read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"--lsa-indexer {folder}: config.json is no indexer configuration ({error!r})") from None


def config_from_json(values: dict[str, Any]) -> IndexerConfig:
    known = {field.name for field in dataclasses.fields(IndexerConfig)}
    given = {name: value for name, value in values.items() if name in known}
    model = ModelShape(**{field.name: int(values["model"][field.name]) for field in dataclasses.fields(ModelShape)})
    heads = tuple((int(layer), int(head)) for layer, head in values["heads"])
    if not heads or any(
        not (0 <= layer < model.num_hidden_layers and 0 <= head < model.q_heads) for layer, head in heads
    ):
        raise ValueError(f"heads {heads} are not heads of {model}")
    return IndexerConfig(**{**given, "model": model, "heads": heads})
