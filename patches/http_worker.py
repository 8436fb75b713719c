"""The application of one HTTP worker (``--tokenizer-worker-num``), made in the worker's own process."""

from __future__ import annotations

from fastapi import FastAPI


def application() -> FastAPI:
    """SGLang's application with our hooks and routes, and those of other plugins; called by uvicorn."""
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.plugins import load_plugins

    from sglang_lsa.plugin import install

    load_plugins()
    install()
    return app
