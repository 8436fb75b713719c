"""Recordings: what one request showed of queries, keys and attention, as a safetensors file; a manifest lists them.

Tensors of a recording (``T`` tokens, ``P`` complete pages, ``L`` observed layers, ``B`` blocks of 16 tokens):

| name | shape | type | what |
| --- | --- | --- | --- |
| ``input_ids`` | ``[T]`` | int32 | the tokens |
| ``queries`` | ``[T - first, L, q_heads, head_dim]`` | the model's | post-RoPE queries from position ``first`` on |
| ``runs`` | ``[P, 32, L, kv_heads, head_dim]`` | the model's | means of 2 post-RoPE keys each |
| ``mass`` | ``[B, layers * q_heads, P or P + 1]`` | float16 | the most of its attention that a head pays to a page |
| ``quest``, ``mean_key`` | ``[B, P]`` | float16 | scores of training-free policies before the block |

Block ``b`` begins at position ``start + 16 b``. A recording of 32K tokens of a model with 24 layers, 14 query and 2 KV
heads of 64, four layers observed and 512 tokens predicted, takes 30 MB: 0.9 KB a token.
"""

from __future__ import annotations

import json
import os
import pathlib
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

BLOCK = 16
"""Positions of which the largest mass is kept."""
FORMAT = "3"
TENSORS = ("input_ids", "queries", "runs", "mass", "quest", "mean_key")


class BadRecording(ValueError):
    """A recording or manifest is missing, damaged, or does not fit the others."""


@dataclass(frozen=True)
class Facts:
    """The numbers of one recording; see the module."""

    prompt_tokens: int
    tokens: int
    start: int
    first: int
    layers: tuple[int, ...]
    model_layers: int
    hidden_size: int
    q_heads: int


def write_recording(path: pathlib.Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Write one file; it appears whole or not at all."""
    partial = path.with_suffix(".partial")
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_host, partial, metadata={"format": FORMAT, "facts": json.dumps(facts)})
    os.replace(partial, path)


def read_recording(path: str | pathlib.Path, names: tuple[str, ...] = TENSORS) -> tuple[Facts, dict[str, torch.Tensor]]:
    """Read the facts of a recording and some of its tensors.

    Raises:
        BadRecording: the file is missing, damaged, of another format, or holds NaN.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise BadRecording(f"{path} is no recording of format {FORMAT}: record again with this version")
            values = json.loads(metadata["facts"])
            facts = Facts(**{**values, "layers": tuple(values["layers"])})
            tensors = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise BadRecording(f"{path} cannot be read ({error.strerror or error}): record it again") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadRecording):
            raise
        raise BadRecording(f"{path} is damaged ({error}): delete it and record it again") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BadRecording(f"{path} has values in {name} that are no numbers: delete it and record it again")
    return facts, tensors
