"""Indexer checkpoints: a folder with ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from dataclasses import dataclass
from typing import Any

from sglang_lsa.config import RECORDED_POSITIONS, RUNS
from sglang_lsa.indexer.expectation import Expectation

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
        expectation: what its sets really cover, see ``indexer.expectation``; None where that was not measured.
        trained: it was; else it was calibrated at the start of a server, see ``indexer.untrained``.
        overlap: sub-keys at the end of a page that are looked at for the page after it, too; see ``page_score``.

    Raises:
        ValueError: a value is impossible; the message says which and what is allowed.
    """

    model: ModelShape
    heads: tuple[tuple[int, int], ...]
    sub_keys: int = 32
    key_dim: int = 32
    positions: int = 64
    threshold: float = 0.0
    coverage: float = 1.0
    trained: bool = True
    expectation: Expectation | None = None
    overlap: int = 0

    def __post_init__(self) -> None:
        model = self.model
        if min(dataclasses.astuple(model)) < 1 or model.q_heads % model.kv_heads:
            raise ValueError(f"{model} is no model: use numbers above 0, and query heads in equal groups")
        if not self.heads or any(
            not (0 <= layer < model.num_hidden_layers and 0 <= head < model.q_heads) for layer, head in self.heads
        ):
            raise ValueError(f"heads {self.heads} are not heads of {model}")
        for name in ("sub_keys", "key_dim", "positions", "overlap"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: use a whole number")
        if self.sub_keys < 1 or RUNS % self.sub_keys:
            raise ValueError(f"sub_keys {self.sub_keys} does not divide a page's {RUNS} parts")
        if not 0 < self.key_dim <= model.head_dim or self.key_dim % 2:
            raise ValueError(
                f"key_dim {self.key_dim} does not fit heads of {model.head_dim}: use an even number up to that"
            )
        if not 0 < self.positions <= RECORDED_POSITIONS:
            raise ValueError(f"positions {self.positions} is out of range: use 1 to {RECORDED_POSITIONS}")
        if not 0 <= self.overlap <= self.sub_keys:
            raise ValueError(
                f"overlap {self.overlap} is out of range: use 0 to {self.sub_keys}, the sub_keys of a page"
            )
        for name, most in (("threshold", math.inf), ("coverage", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}: use a number")
            if not 0 <= value <= most or math.isinf(value):
                raise ValueError(f"{name} {value} is out of range: use 0 to {'any number' if most > 1 else 1}")

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
        return self.rank_page_bytes(1)

    def rank_page_bytes(self, ranks: int) -> int:
        """The same on that of several ranks which has the most; each keeps keys for the query heads that it has."""
        rank_of = {head: head[1] * ranks // self.model.q_heads for head in self.heads}
        keys = ({self.key_head(head) for head in self.heads if rank_of[head] == rank} for rank in range(ranks))
        return max(map(len, keys)) * self.sub_keys * self.key_dim

    def require_model(self, shape: ModelShape, asked: str, otherwise: str = "") -> None:
        """Raise ValueError unless the model at hand is of the shape that this indexer was trained for.

        Args:
            asked: by which argument this indexer was named, and what it named.
            otherwise: what else than making an indexer can be done where none that is shipped fits.
        """
        if shape == self.model:
            return
        make = f"make one for it with sglang-lsa adapt{otherwise}"
        names = " or ".join(shipped_for(shape))
        raise ValueError(
            f"{asked} was trained for a model of {self.model}; this one is of {shape}: "
            + (f"use {names}, which comes with the package for a model of this shape" if names else make)
        )


def shipped_indexers() -> list[str]:
    """Names of the indexers that come with the package."""
    return sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir()) if SHIPPED.is_dir() else []


def shipped_for(shape: ModelShape) -> list[str]:
    """Names of those that were trained for a model of this shape; whether it is that model, its weights say alone."""
    return [name for name in shipped_indexers() if read_checkpoint_config(name).model == shape]


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
        raise ValueError(f"--lsa-indexer {folder}: config.json is no indexer configuration ({_words(error)})") from None


def write_config(folder: pathlib.Path, config: IndexerConfig) -> None:
    """Write ``config.json`` of a checkpoint folder."""
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def config_from_json(values: dict[str, Any]) -> IndexerConfig:
    known = {field.name for field in dataclasses.fields(IndexerConfig)}
    given = {name: value for name, value in values.items() if name in known}
    model = ModelShape(**{field.name: int(values["model"][field.name]) for field in dataclasses.fields(ModelShape)})
    heads = tuple((int(layer), int(head)) for layer, head in values["heads"])
    if (told := given.get("expectation")) is not None:
        points = tuple(tuple(float(number) for number in point) for point in told["points"])
        given["expectation"] = Expectation(points, str(told["source"]))  # type: ignore[arg-type]
    return IndexerConfig(**{**given, "model": model, "heads": heads})
