"""The task that follows every stream ends its own request, and none of the same name."""

from __future__ import annotations

import asyncio

from sglang_lsa.patches.hook import Hook
from sglang_lsa.serve.screen.rids import owned

DELAY = 2.0
"""Seconds, as SGLang waits."""


def create_abort_task(original, self, obj):
    from starlette.background import BackgroundTasks

    async def abort() -> None:
        await asyncio.sleep(DELAY)
        lives = getattr(obj, "lsa_lives", {})  # none: it was refused, and what runs under its name is another's
        samples = getattr(self, "logical_rid_to_child_rids", {})  # 0.5.23 keeps none: samples are requests like others
        for rid in owned(lives, self.rid_to_state, samples):
            self.abort_request(rid)

    tasks = BackgroundTasks()
    tasks.add_task(abort)
    return tasks


HOOK = Hook(
    target="sglang.srt.managers.tokenizer_manager.TokenizerManager.create_abort_task",
    kind="around",
    function=create_abort_task,
    parameters=("self", "obj"),
    why="SGLang aborts by name: a stream refused because its rid is running ends the one that runs.",
    until="SGLang's task looks at whose request it ends.",
    test="tests/server/test_screen.py::test_a_refused_stream_does_not_end_the_first",
    relies_on=("sglang.srt.managers.tokenizer_manager.TokenizerManager.abort_request",),
)
