"""What all servers of the GPU tests are started with."""

from __future__ import annotations

STOCK = "sglang.launch_server"
CHUNK = 2048
SERVED = ["--served-model-name", "smollm2", "--attention-backend", "flashinfer", "--page-size", "64"]
SERVED += ["--cuda-graph-backend-prefill", "disabled", "--skip-server-warmup", "--chunked-prefill-size", str(CHUNK)]
SERVED += ["--mem-fraction-static", "0.25"]
READY_SECONDS = 400
