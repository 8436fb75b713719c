"""The ``--lsa-*`` flags, made from the fields of LSAConfig."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import Any

from sglang_lsa.config.values import LSAConfig, flag_of, read_json_object


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add one ``--lsa-*`` flag per configuration field, and ``--lsa-config``."""
    group = parser.add_argument_group("Lookahead Sparse Attention (sglang-lsa)")
    group.add_argument("--lsa-config", metavar="FILE.json", help="Read LSA options from a JSON file; flags win.")
    for field in dataclasses.fields(LSAConfig):
        options: dict[str, Any] = {"default": None, "help": field.metadata["help"]}
        if str(field.type) == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _PARSERS[str(field.type).removesuffix(" | None")]
            options["metavar"] = field.metadata["metavar"]
            options["choices"] = field.metadata["choices"]
            if field.default is not None:
                options["help"] += f" Default: {field.default}."
        group.add_argument(flag_of(field.name), **options)


def config_from_args(args: argparse.Namespace) -> LSAConfig | None:
    """The configuration that the ``--lsa-*`` flags in ``args`` ask for; None when there is none of them."""
    given = {
        field.name: value
        for field in dataclasses.fields(LSAConfig)
        if (value := getattr(args, f"lsa_{field.name}", None)) is not None
    }
    path = getattr(args, "lsa_config", None)
    if path is None and not given:
        return None
    return LSAConfig.from_mapping({**(read_json_object(path) if path else {}), **given}, str(path or "--lsa flags"))


def config_from_argument(value: LSAConfig | dict[str, Any] | str | pathlib.Path | None) -> LSAConfig | None:
    """The configuration given to ``sgl.Engine(lsa_config=...)``: an LSAConfig, a mapping, or the path of a file."""
    if value is None or isinstance(value, LSAConfig):
        return value
    if isinstance(value, dict):
        return LSAConfig.from_mapping(value, "lsa_config")
    if isinstance(value, str | pathlib.Path):
        return LSAConfig.from_file(value)
    raise ValueError(f"lsa_config is {value!r}: use an LSAConfig, a mapping or the path of a JSON file")


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


_PARSERS: dict[str, Any] = {"str": str, "int": int, "float": float, "tuple[int, ...]": _layers}
