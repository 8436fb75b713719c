"""What all servers of the GPU tests are started with."""

from __future__ import annotations

from sglang_lsa.patches.compatibility import flash_attention_problem

STOCK = "sglang.launch_server"
CHUNK = 2048
NO_FLASH_ATTENTION = flash_attention_problem({})
"""Why FlashAttention-3 cannot be used here; None if it can."""
AS_LSA_ATTENDS = ["--attention-backend", "flashinfer"]
"""Has stock SGLang attend with the kernels that LSA takes by default."""
if NO_FLASH_ATTENTION is None:
    AS_LSA_ATTENDS += ["--prefill-attention-backend", "fa3"]
SERVED = ["--served-model-name", "smollm2", "--page-size", "64"]
SERVED += ["--cuda-graph-backend-prefill", "disabled", "--skip-server-warmup", "--chunked-prefill-size", str(CHUNK)]
SERVED += ["--mem-fraction-static", "0.25"]
READY_SECONDS = 400
