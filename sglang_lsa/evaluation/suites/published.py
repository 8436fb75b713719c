"""Files of published benchmarks: JSON lists or JSON lines, checked as they are read."""

from __future__ import annotations

import gzip
import json
import lzma
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any


def plain(name: str) -> str:
    """With hyphens for what is no letter, digit, hyphen or underscore."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)


def records(path: pathlib.Path, keys: Mapping[str, type | tuple[type, ...]]) -> Iterator[dict[str, Any]]:
    """Records of a JSON list or of JSON lines, packed or not, that have at least ``keys``, of these types.

    Raises:
        ValueError: the file is missing or cannot be read, or a record is something else.
    """
    for number, record in enumerate(read(path)):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: record {number} is {seen(record)}, no object: give the published file")
        for key, kind in keys.items():
            if key not in record:
                raise ValueError(f"{path}: record {number} has no {key!r}, only {', '.join(record)}: add it")
            if not isinstance(record[key], kind):
                kinds = " or ".join(part.__name__ for part in (kind if isinstance(kind, tuple) else (kind,)))
                raise ValueError(f"{path}: record {number}: {key} is {seen(record[key])}: make it {kinds}")
        yield record


def read(path: pathlib.Path) -> list[Any]:
    """A JSON list, or the values of JSON lines."""
    try:
        data = path.read_bytes()
        text = decompressed(data).decode()
        if re.match(r"\s*\[", text):
            return json.loads(text)
        found = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read: {error}: give the published file, JSON or JSON lines") from None
    if not found:
        raise ValueError(f"{path} is empty: give the published file, JSON or JSON lines")
    return found


def decompressed(data: bytes) -> bytes:
    """What gzip or xz has packed, or what is given."""
    packers = ((b"\x1f\x8b", gzip.decompress), (b"\xfd7zXZ\x00", lzma.decompress))
    return next((unpack(data) for magic, unpack in packers if data.startswith(magic)), data)


def seen(value: object) -> str:
    """A value as errors show it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
