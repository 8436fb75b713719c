"""The ``--lsa-*`` flags, made from the fields of LSAConfig."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from sglang_lsa.config.allowed import AUTO, SHARE
from sglang_lsa.config.kinds import FLAG, REMOVED, flag_of
from sglang_lsa.config.values import LSAConfig, read_json_object


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add one ``--lsa-*`` flag per option, and ``--lsa-config``; flags of earlier versions say what became of them."""
    group = parser.add_argument_group("Lookahead Sparse Attention (sglang-lsa)")
    group.add_argument("--lsa-config", metavar="JSON", help="Options from a JSON file, or a JSON object; flags win.")
    for field in dataclasses.fields(LSAConfig):
        if field.metadata["kind"] != FLAG:
            continue
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
    for name, advice in REMOVED.items():
        group.add_argument(flag_of(name), dest=argparse.SUPPRESS, action=_Refuse, const=advice)


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


class _Refuse(argparse.Action):
    """A flag that is gone, and not in ``--help``: one line says what to do, before anything is loaded."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: str):
        hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        super().__init__(option_strings, dest, nargs="?", const=const, **hidden)

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string} is gone: {self.const}")


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _share(text: str) -> float | str:
    if text == AUTO:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no budget: use a number in (0, 1], or {AUTO}") from None


_PARSERS: dict[str, Any] = {"str": str, "int": int, "float": float, "tuple[int, ...]": _layers, SHARE: _share}
