"""A malformed request is the client's mistake, also where SGLang stumbles over it."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.serve.screen.request import refusing, screen_samples


def normalize(original, self):
    with refusing("the request"):
        screen_samples(self)
        return original(self)


HOOK = Hook(
    target="sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments",
    kind="around",
    function=normalize,
    parameters=("self",),
    why="Lists of other lengths, or of another type, are HTTP 500; a huge n fills memory.",
    until="SGLang checks the shapes of batches.",
    test="tests/server/test_screen.py::test_refused_and_alive",
)
