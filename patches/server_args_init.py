"""``sgl.Engine(lsa_config=...)``: an LSAConfig, a mapping, or the path of a JSON file."""

from __future__ import annotations

from collections.abc import Callable

from sglang_lsa.config import config_from_argument
from sglang_lsa.patches.compatibility import apply_defaults, attach
from sglang_lsa.patches.hook import Hook

before_lsa: Callable[[], None] | None = None
"""Installs the hooks that serve, where only those of the intake are; put here by the plugin, which knows all hooks."""


def init(original, self, *args, **kwargs):
    config = config_from_argument(kwargs.pop("lsa_config", None))
    if config is None:
        return original(self, *args, **kwargs)
    if before_lsa is not None:
        before_lsa()
    apply_defaults(kwargs, config)
    original(self, *args, **kwargs)
    attach(self, config)


HOOK = Hook(
    target="sglang.srt.server_args.ServerArgs.__init__",
    kind="around",
    function=init,
    parameters=("self",),
    why="sgl.Engine builds ServerArgs from keyword arguments, past the command line.",
    until="SGLang keeps plugin options on ServerArgs.",
    test="tests/server/test_engine.py::test_engine_takes_a_config",
    relies_on=(
        "sglang.srt.server_args.ServerArgs.__post_init__",
        "sglang.srt.entrypoints.engine.Engine.__init__",
    ),
)
