"""New weights: an indexer that was trained for the old ones is said to be stale."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def note_new_weights(result, self, recv_req, *told):
    self.tp_worker.model_runner.lsa.weights_changed()


HOOK = Hook(
    target="sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
    ".flush_cache_after_weight_update",
    kind="after",
    function=note_new_weights,
    parameters=("self", "recv_req"),
    why="Every successful update comes by here, from disk, tensors, IPC or another process, flushed or not.",
    until="SGLang tells plugins of new weights.",
    test="tests/server/test_features_workers.py::test_weights_are_updated_under_load",
    relies_on=("sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager",),
)
