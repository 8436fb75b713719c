"""``--lsa-*`` flags on SGLang's own command line."""

from __future__ import annotations

from sglang_lsa.config import add_cli_args
from sglang_lsa.patches.hook import Hook


def add_flags(result, parser):
    add_cli_args(parser)


HOOK = Hook(
    target="sglang.srt.server_args.ServerArgs.add_cli_args",
    kind="after",
    function=add_flags,
    parameters=("parser",),
    why="SGLang's parser dies on flags it does not know.",
    until="SGLang lets plugins add flags.",
    test="tests/unit/test_plugin.py::test_flags_reach_server_args",
)
