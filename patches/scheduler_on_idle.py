"""Metrics of an idle server show that it is idle, not its last busy moment."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook


def bring_metrics_up_to_date(self):
    self.tp_worker.model_runner.lsa.on_idle()


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.on_idle",
    kind="before",  # SGLang sleeps at its end
    function=bring_metrics_up_to_date,
    parameters=("self",),
    why="SGLang frees a request's pages after it is gone; no later pass would show that.",
    until="SGLang tells plugins when it is idle.",
    test="tests/server/test_monitoring.py::test_every_documented_metric_is_scraped_and_agrees_with_the_status",
)
