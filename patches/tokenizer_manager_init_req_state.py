"""The screen: every request, once SGLang has made one of each prompt, and before anything is kept of it."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.patches.resolved import resolved
from sglang_lsa.serve.screen.header import asked, merged
from sglang_lsa.serve.screen.request import refusing, screen
from sglang_lsa.serve.screen.rids import life_of
from sglang_lsa.serve.screen.rules import Server


def screened(original, self, obj, *rest, **named):
    config = getattr(self.server_args, "lsa_config", None)  # absent for a stock Engine beside one with LSA
    if config is None or hasattr(obj, "lsa_screened") or not hasattr(obj, "return_logprob"):
        return original(self, obj, *rest, **named)  # a sample of one that was screened, or an embedding
    with refusing("the request"):
        server = described(self)
        ones = [obj] if obj.is_single else [obj[number] for number in range(obj.batch_size)]
        for one in ones:
            screen(one, server)
            one.sampling_params = merged(one.sampling_params, asked.get())
    result = original(self, obj, *rest, **named)
    for one in ones:
        one.lsa_screened = True
    # See tokenizer_manager_create_abort_task.
    obj.lsa_lives = {one.rid: life_of(self.rid_to_state[one.rid]) for one in ones}
    return result


def described(manager) -> Server:
    """What of the server the rules ask for; looked up once."""
    known = manager.__dict__.get("lsa_screen")
    if known is None:
        from sglang.srt.managers.schedule_batch import PositionalEmbeds
        from sglang.srt.sampling.sampling_params import SamplingParams

        arguments, model = resolved(manager.server_args), manager.model_config
        known = manager.lsa_screen = Server(
            vocabulary=model.vocab_size,
            hidden_size=model.hidden_size,
            dtype=str(model.dtype).removeprefix("torch."),
            disaggregated=arguments.disaggregation_mode != "null",
            encoders=arguments.language_only,
            lora=bool(manager.enable_lora),
            delimiters=bool(arguments.enable_mis),
            labels=frozenset(arguments.tokenizer_metrics_allowed_custom_labels or ()),
            sampling=frozenset(SamplingParams.__struct_fields__),
            resident=frozenset({PositionalEmbeds}),
        )
    return known


HOOK = Hook(
    target="sglang.srt.managers.tokenizer_manager.TokenizerManager._init_req_state",
    kind="around",
    function=screened,
    parameters=("self", "obj"),
    why="SGLang's scheduler and detokenizer end with the first value that they do not expect.",
    until="SGLang checks the fields in sglang_lsa/serve/screen/table.py itself.",
    test="tests/server/test_screen.py::test_refused_and_alive",
    relies_on=(
        "sglang.srt.managers.embed_types.PositionalEmbeds",
        "sglang.srt.sampling.sampling_params.SamplingParams",
    ),
)
