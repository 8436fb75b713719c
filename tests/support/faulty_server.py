"""LSA's server, in which things go wrong for requests of certain names: ``python -m faulty_server [flags]``.

SGLang spawns its scheduler, which imports this module as ``__mp_main__`` before it starts; so both processes have the
faults.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_lsa import launch_server
from sglang_lsa.engine.policies import Quest
from sglang_lsa.engine.prefill import Prefill
from sglang_lsa.engine.refresh import Refresher
from sglang_lsa.engine.request import Refresh, Request
from sglang_lsa.engine.runtime import LSARuntime
from sglang_lsa.engine.step import DECODE
from sglang_lsa.memory.resident_table import ResidentTable
from sglang_lsa.memory.staging import StagedPages, Staging

DOOMED: set[str] = set()
"""Kinds of fault that the batch being queued asks for: what the names of its requests begin with."""


def install_faults() -> None:
    before_forward, switch, score_all = LSARuntime.before_forward, Refresher._read, Quest.score_all
    read, layer, chosen, remap = Staging.read, StagedPages.layer, Prefill._chosen, ResidentTable.remap

    def answered(request: Request | None) -> bool:
        return request is not None and request.tokens > request.prompt_tokens + 4

    def doomed_batch(self: LSARuntime, batch: Any, new_pages: Any) -> int:
        DOOMED.clear()
        DOOMED.update(key.split("-")[0] for key in batch.keys)
        if "oomdecode" in DOOMED and batch.kind == DECODE and any(map(answered, map(self.requests.get, batch.keys))):
            raise torch.OutOfMemoryError("injected: no memory for a decode step")
        return before_forward(self, batch, new_pages)

    def doomed_switch(self: Refresher, request: Request, new: Refresh, needed: Any) -> None:
        if request.rid.startswith("badswitch") and request.window > 0:
            raise RuntimeError("injected: the table cannot be written")
        switch(self, request, new, needed)

    def doomed_scores(self: Quest, requests: Any, pages: Any) -> torch.Tensor:
        if any(request.rid.startswith("badscore") for request in requests):
            raise RuntimeError("injected: no scores")
        return score_all(self, requests, pages)

    def doomed_read(self: Staging, virtual: Any) -> StagedPages:
        if "oomplan" in DOOMED:
            raise torch.OutOfMemoryError("injected: no memory to plan a streamed pass")
        return read(self, virtual)

    def doomed_layer(self: StagedPages, number: int) -> Any:
        if "oomlayer" in DOOMED and number == 3:
            raise RuntimeError("injected: DefaultCPUAllocator: can't allocate memory")
        return layer(self, number)

    def doomed_choice(self: Prefill, request: Request) -> Any:
        if request.rid.startswith("badchoice"):
            raise RuntimeError("injected: no choice")
        return chosen(self, request)

    def doomed_remap(self: ResidentTable, row: int, physical: Any, tail_start: int) -> None:
        if "badtable" in DOOMED and tail_start:
            raise RuntimeError("injected: the table is gone")
        remap(self, row, physical, tail_start)

    LSARuntime.before_forward, Refresher._read, Quest.score_all = doomed_batch, doomed_switch, doomed_scores  # type: ignore
    Staging.read, StagedPages.layer, Prefill._chosen = doomed_read, doomed_layer, doomed_choice  # type: ignore
    ResidentTable.remap = doomed_remap  # type: ignore


if __name__ in ("__main__", "__mp_main__"):
    install_faults()
if __name__ == "__main__":
    launch_server.main()
