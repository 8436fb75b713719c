"""The doctor's plan is what the server then has: asked with the flags of a server that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sglang_lsa.server_process import ServerProcess

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_the_plan_is_what_the_server_has(lsa: ServerProcess, flags_of_lsa: list[str]) -> None:
    command = [sys.executable, "-m", "sglang_lsa.cli", "doctor", *flags_of_lsa, "--context-tokens", "8192", "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    plan, status = json.loads(run.stdout)["plan"], lsa.get("/lsa/status")
    assert plan["page_bytes"] == status["page_bytes"]
    assert plan["physical_pages"] == status["physical"]["pages"]
    assert plan["kv_bytes"] == status["physical"]["kv_bytes"]
    assert plan["overhead_bytes"] == status["physical"]["overhead_bytes"]
    assert plan["virtual_pages"] == status["virtual"]["pages"]
    assert plan["mirror_bytes"] == status["host"]["mirror_bytes"]
    assert plan["max_running_requests"] + 1 == status["rows"]
    (contexts,) = json.loads(run.stdout)["contexts"]
    assert contexts["stock"] < contexts["lsa"] <= plan["virtual_pages"] // 128
