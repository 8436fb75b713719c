"""``sgl.Engine(lsa_config=...)``: an LSAConfig, a mapping, or the path of a JSON file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_lsa.config import config_from_argument
from sglang_lsa.patches.compatibility import apply_defaults, attach
from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.resolved import take_in

before_lsa: Callable[[], None] | None = None
"""Installs the hooks that serve, where only those of the intake are; put here by the plugin, which knows all hooks."""


def with_lsa_config(original: type) -> Any:
    """What makes an engine's arguments in place of the class ``original``."""

    def make(*args: Any, **kwargs: Any) -> Any:
        config = config_from_argument(kwargs.pop("lsa_config", None))
        if config is None:
            return original(*args, **kwargs)
        if before_lsa is not None:
            before_lsa()
        apply_defaults(kwargs, config)
        return take_in(original(*args, **kwargs), config, attach)

    return staticmethod(make)


HOOK = Hook(
    target="sglang.srt.entrypoints.engine.Engine.server_args_class",
    kind="attribute",
    function=with_lsa_config,
    parameters=(),
    why="sgl.Engine builds its arguments from keyword arguments, past the command line, and knows its own only.",
    until="SGLang keeps plugin options on ServerArgs.",
    test="tests/server/test_engine.py::test_engine_takes_a_config",
    relies_on=(
        "sglang.srt.server_args.ServerArgs.__post_init__",
        "sglang.srt.entrypoints.engine.Engine.__init__",
    ),
)
