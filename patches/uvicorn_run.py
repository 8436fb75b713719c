"""Every HTTP worker of ``--tokenizer-worker-num`` has our routes and checks, too."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook

SGLANG_APP = "sglang.srt.entrypoints.http_server:app"
OURS = "sglang_lsa.patches.http_worker:application"


def serve_our_application(app, *args, **kwargs):
    if app == SGLANG_APP:
        return (OURS, *args), {**kwargs, "factory": True}
    return None  # the application itself: it is served from this process, where the plugin is installed


HOOK = Hook(
    target="uvicorn.run",
    kind="before",
    function=serve_our_application,
    parameters=("app",),
    why="uvicorn starts workers by the name of the application, in processes where SGLang loads no plugins.",
    until="SGLang loads plugins in its HTTP workers.",
    test="tests/server/test_features_workers.py::test_every_worker_has_our_routes",
)
