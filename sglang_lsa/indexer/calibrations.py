"""Calibrated indexers in the user's cache folder, each by what it was calibrated for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from sglang_lsa.embedded_model import cache_folder
from sglang_lsa.indexer.checkpoint import ModelShape, read_checkpoint_config
from sglang_lsa.indexer.model import MemoryIndexer

FORMAT = 3
"""Grows when prompts, heads or weights are found in another way, of which the name of a calibration tells nothing."""
FACTS = "calibration.json"
SAMPLED = 4096
"""Numbers of each tensor that its fingerprint is of."""
ABANDONED_S = 24 * 3600.0
"""After so long a calibration that was not finished never will be."""


@dataclass(frozen=True)
class Calibration:
    """What a calibration came to.

    Attributes:
        found: there are heads that look at evidence; else there is no indexer.
        prompts, seconds: that it took.
        lift: of the best heads, see ``untrained.lifts``.
        format: see :data:`FORMAT`.
    """

    found: bool
    prompts: int
    seconds: float
    lift: float
    format: int = FORMAT


def key_of(shape: ModelShape, parameters: Iterable[tuple[str, torch.Tensor]], made: str) -> str:
    """The name of a calibration: a hash of the model's shape, of evenly spread numbers of all of its weights, and of
    how it is made: by which prompts, of how many heads, and what these look at. Reads a few MB however large the model
    is; weights that were trained further differ everywhere."""
    digest = hashlib.sha256(json.dumps([asdict(shape), made]).encode())
    for name, value in parameters:
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().reshape(-1) if value.is_contiguous() else value.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].contiguous().cpu()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def folder_of(key: str) -> pathlib.Path:
    """Where the calibration of that name is, if there is one."""
    return cache_folder() / "calibrations" / key


def read(folder: pathlib.Path) -> Calibration | None:
    """The calibration in ``folder``; None where there is none that can be used.

    Raises:
        ValueError: there is one, but of another version or damaged; the message says so.
    """
    try:
        values = json.loads((folder / FACTS).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} cannot be read ({error})") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        seen = values.get("format") if isinstance(values, dict) else None
        raise ValueError(f"{folder} is of another version (format {seen}; this one writes {FORMAT})")
    try:
        found = Calibration(**values)
    except TypeError as error:
        raise ValueError(f"{folder} is damaged ({error})") from None
    if found.found:
        read_checkpoint_config(folder)
        MemoryIndexer.load(folder)
    return found


def write(folder: pathlib.Path, calibration: Calibration, indexer: MemoryIndexer | None) -> None:
    """Write it; it appears whole or not at all, and replaces what was there.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(".partial-*"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(leftover, ignore_errors=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        if indexer is not None:
            indexer.save(partial)
        (partial / FACTS).write_text(json.dumps(asdict(calibration), indent=1) + "\n")
        if folder.exists():
            folder.rename(partial / "replaced")
        os.rename(partial, folder)
        shutil.rmtree(folder / "replaced", ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or not isinstance(error, Exception):
            raise
        raise OSError(f"{folder} cannot be written ({error})") from error
