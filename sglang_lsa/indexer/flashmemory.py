"""FlashMemory's retriever as it was published, for DeepSeek-V4: its checkpoint, and the queries that it makes.

Only the query side is learned; keys are those of the model's own indexer, see ``kernels.retriever_score``. A server
scores pages with it by ``engine.policies.retriever``.

Source: arXiv 2606.09079 and the names and shapes of the released checkpoint.
"""

from __future__ import annotations

import functools
import math
import pathlib
import pickle
import re
from dataclasses import dataclass

import torch
from torch.nn.functional import rms_norm

from sglang_lsa.kernels.retriever_score import DIM, retriever_score

ROTATED = 64
"""The last dimensions of a head, which are rotated by position."""
BASE, FACTOR, ORIGINAL_POSITIONS, BETA_FAST, BETA_SLOW = 160_000.0, 16.0, 65_536, 32.0, 1.0
"""YaRN, as DeepSeek-V4 uses it."""
MAX_POSITION = 1 << 20
"""Positions from here on are rotated like the last one before."""
NAMES = ("wq_a.weight", "wq_b.weight", "q_norm_weight", "weights_proj.weight")


@dataclass(frozen=True)
class Retriever:
    """The query side of one layer.

    Attributes:
        down: ``[rank, hidden]``.
        up: ``[heads * 128, rank]``.
        norm: ``[rank]``.
        votes: ``[heads, hidden]``.
    """

    down: torch.Tensor
    up: torch.Tensor
    norm: torch.Tensor
    votes: torch.Tensor

    @property
    def heads(self) -> int:
        return len(self.votes)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    @property
    def _parts(self) -> tuple[torch.Tensor, ...]:
        return self.down, self.up, self.norm, self.votes

    def to(self, device: torch.device, dtype: torch.dtype) -> Retriever:
        """This one in another place and type."""
        return Retriever(*(part.to(device, dtype) for part in self._parts))

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and weights.

        Args:
            hidden: ``[batch, hidden]`` what enters the layer's indexer; its type is computed in.
            positions: int64 ``[batch]``.

        Returns:
            ``[batch, heads, 128]`` and ``[batch, heads]``.
        """
        down, up, norm, votes = (part.to(hidden.dtype) for part in self._parts)
        queries = rms_norm(hidden @ down.T, norm.shape, norm, eps=1e-6) @ up.T
        queries = hadamard(rotate(queries.unflatten(-1, (self.heads, DIM)), positions))
        return queries, hidden @ votes.T * (DIM * self.heads) ** -0.5


def score(
    retrievers: dict[int, Retriever],
    hidden: dict[int, torch.Tensor],
    positions: torch.Tensor,
    packed: dict[int, torch.Tensor],
) -> torch.Tensor:
    """The best layer decides: probabilities ``[batch, keys]`` that a key is needed.

    Args:
        hidden: by layer ``[batch, hidden]``.
        positions: int64 ``[batch]``.
        packed: by layer uint8 ``[keys, 132]``, the same tokens in all of them.
    """
    logits = [
        retriever_score(*retriever(hidden[layer], positions), packed[layer]) for layer, retriever in retrievers.items()
    ]
    return torch.stack(logits).amax(dim=0).sigmoid()


def load_retrievers(path: str | pathlib.Path) -> dict[int, Retriever]:
    """Read a checkpoint: the joint one, ``retrievers.l{number}.*``, or one of a single layer, which gets number 0.

    Numbers count the layers that have an indexer, not all layers.

    Raises:
        ValueError: the file cannot be read without running code from it, or names or shapes are others.
    """
    layers = _parts_of(path)
    return {layer: _retriever(path, layer, layers[layer]) for layer in sorted(layers)}


@functools.cache
def numbers_of(path: str | pathlib.Path) -> tuple[int, ...]:
    """Numbers of the layers of a checkpoint, as :func:`load_retrievers` has them, ascending; reads no values.

    Raises:
        ValueError: the file cannot be read without running code from it, or has none of the names.
    """
    return tuple(sorted(_parts_of(path, mmap=True)))


@functools.cache
def numbers_in(path: str | pathlib.Path) -> int:
    """How many numbers the layers of a checkpoint have together; reads none of them.

    Raises:
        ValueError: as :func:`numbers_of`.
    """
    return sum(part.numel() for parts in _parts_of(path, mmap=True).values() for part in parts.values())


def _parts_of(path: str | pathlib.Path, mmap: bool = False) -> dict[int, dict[str, torch.Tensor]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}): give a FlashMemory checkpoint") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no checkpoint of tensors ({problem}): give a FlashMemory checkpoint") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}: give a FlashMemory checkpoint")
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(?:retrievers\.l(\d+)\.)?(.+)", str(name))
        if found and found[2] in NAMES:
            layers.setdefault(int(found[1] or 0), {})[found[2]] = value
    if not layers:
        raise ValueError(f"{path} has no {NAMES[0]}: give a FlashMemory checkpoint (seen: {list(state)[:3]})")
    return layers


def _retriever(path: str | pathlib.Path, layer: int, parts: dict[str, torch.Tensor]) -> Retriever:
    missing = [name for name in NAMES if name not in parts]
    if missing:
        raise ValueError(f"{path}: layer {layer} has no {missing[0]}: the checkpoint is incomplete")
    down, up, norm, votes = (parts[name] for name in NAMES)
    shapes = {name: tuple(parts[name].shape) for name in NAMES}
    rank, hidden = down.shape if down.dim() == 2 else (0, 0)
    heads = len(votes)
    if shapes != {
        NAMES[0]: (rank, hidden),
        NAMES[1]: (heads * DIM, rank),
        NAMES[2]: (rank,),
        NAMES[3]: (heads, hidden),
    }:
        raise ValueError(f"{path}: layer {layer} has tensors that do not fit each other: {shapes}")
    if not all(torch.isfinite(part).all() for part in parts.values()):
        raise ValueError(f"{path}: layer {layer} has values that are no numbers: get the checkpoint again")
    return Retriever(down, up, norm, votes)


def frequencies() -> torch.Tensor:
    """Radians a position turns each of the 32 pairs, float64 ``[32]``, by YaRN (Peng et al., arXiv 2309.00071)."""
    plain = BASE ** -(torch.arange(0, ROTATED, 2, dtype=torch.float64) / ROTATED)

    def pair_that_turns(times: float) -> float:
        return ROTATED * math.log(ORIGINAL_POSITIONS / (times * 2 * math.pi)) / (2 * math.log(BASE))

    low = max(math.floor(pair_that_turns(BETA_FAST)), 0)
    high = min(math.ceil(pair_that_turns(BETA_SLOW)), ROTATED - 1)
    slow = ((torch.arange(ROTATED // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain / FACTOR * slow + plain * (1 - slow)


def rotate(queries: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Turn the last 64 dimensions, neighbours being the two parts of a complex number: ``[batch, heads, 128]``."""
    at = positions.clamp(max=MAX_POSITION - 1).to(torch.float64)
    angles = (at[:, None] * frequencies().to(at.device))[:, None, :]
    cos, sin = angles.cos().to(queries.dtype), angles.sin().to(queries.dtype)
    still, turned = queries[..., :-ROTATED], queries[..., -ROTATED:].unflatten(-1, (-1, 2))
    real, imaginary = turned.unbind(dim=-1)
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).flatten(-2)
    return torch.cat((still, turned), dim=-1)


def hadamard(values: torch.Tensor) -> torch.Tensor:
    """The normalised Walsh-Hadamard transform of the last dimension, a power of two, in Sylvester's order."""
    size = values.shape[-1]
    result, half = values.reshape(-1, size), 1
    while half < size:
        pairs = result.view(len(result), -1, 2, half)
        result = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2).view(-1, size)
        half *= 2
    return (result * size**-0.5).view(values.shape)
