"""Bad ``custom_params.lsa`` is answered with HTTP 400 before the request leaves the HTTP process."""

from __future__ import annotations

from sglang_lsa.config import RequestOptions
from sglang_lsa.patches.architectures import is_deepseek_v4, page_tokens
from sglang_lsa.patches.hook import Hook


def validate_custom_params(result, self, obj, input_ids):
    config = getattr(self.server_args, "lsa_config", None)  # absent for a stock Engine beside one with LSA
    params = getattr(obj, "sampling_params", None)
    if config is not None and isinstance(params, dict):
        # As it was at start: whether a request is refused depends only on what cannot change (indexer, record).
        model = self.model_config
        RequestOptions.parse(params.get("custom_params"), config, page_tokens(model), is_deepseek_v4(model))


HOOK = Hook(
    target="sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request",
    kind="after",
    function=validate_custom_params,
    parameters=("self", "obj", "input_ids"),
    why="A ValueError raised here is SGLang's own way to HTTP 400.",
    until="SGLang lets plugins validate requests.",
    test="tests/server/test_requests.py::test_bad_custom_params_are_refused",
)
