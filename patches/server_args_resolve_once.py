"""Arguments are checked once SGLang has resolved them, where it does that after it has made them."""

from __future__ import annotations

from sglang_lsa.patches.compatibility import attach
from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.resolved import check_once


def check(result, self):
    check_once(self, attach)


HOOK = Hook(
    target="sglang.srt.server_args.ServerArgs.resolve_once",
    kind="after",
    function=check,
    parameters=("self",),
    why="What the user left open, and what the model decides, is not known before.",
    until="SGLang lets plugins check arguments.",
    test="tests/unit/test_plugin.py::test_flags_reach_server_args",
    relies_on=(
        "sglang.srt.arg_groups.model_override_base.ResolvingConfig",
        "sglang.srt.arg_groups.model_override_base.resolving_view",
    ),
)
