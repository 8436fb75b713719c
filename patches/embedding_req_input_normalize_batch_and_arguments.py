"""A malformed request for an embedding, which generating models refuse anyway, is the client's mistake too."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.serve.screen.request import refusing


def normalize(original, self):
    with refusing("the request"):
        return original(self)


HOOK = Hook(
    target="sglang.srt.managers.io_struct.EmbeddingReqInput.normalize_batch_and_arguments",
    kind="around",
    function=normalize,
    parameters=("self",),
    why="An empty list, or one id for several prompts, is HTTP 500.",
    until="SGLang checks the shapes of batches.",
    test="tests/server/test_screen.py::test_refused_and_alive",
)
