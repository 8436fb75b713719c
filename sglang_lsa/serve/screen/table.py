"""The table: every field of a request that SGLang does not check, with what it may be."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_lsa.serve.screen import field_rules, rules, sampling_rules
from sglang_lsa.serve.screen.rules import INT32, Rule

ENDS, ENDS_TOGETHER, ERROR, OTHERS = (
    "the server ends",
    "the server ends, with other requests in the batch",
    "HTTP 500",
    "other requests lose their answers",
)
"""What stock SGLang does with a value that is not allowed."""
TYPED = "with `SGLANG_USE_PICKLE_IPC=0`, the server ends"
INTERNAL = "an internal field is taken from the client"


@dataclass(frozen=True)
class Row:
    """One field.

    Attributes:
        field: of ``GenerateReqInput``; ``sampling_params.x`` for one of ``SamplingParams``.
        allowed: in words, for the documentation.
        stock: what stock SGLang does otherwise.
        rule: see :mod:`sglang_lsa.serve.screen.rules`.
        example: smallest value that is not allowed, as JSON; "" where it takes several fields or many values.
        also: other names of the field in the OpenAI protocols.
    """

    field: str
    allowed: str
    stock: str
    rule: Rule
    example: str = ""
    also: tuple[str, ...] = ()

    @property
    def sampling(self) -> str | None:
        """Its name in ``sampling_params``, if it is there."""
        head, _, name = self.field.partition(".")
        return name if head == "sampling_params" else None


def _sampling(name: str, *rest, **named) -> Row:
    return Row(f"sampling_params.{name}", *rest, **named)


FINITE = rules.number()
SAMPLING: tuple[Row, ...] = (
    _sampling(
        "max_new_tokens",
        "a whole number; null for all that fit",
        ENDS,
        sampling_rules.length,
        "5.5",
        also=("max_tokens", "max_completion_tokens", "max_output_tokens"),
    ),
    _sampling("min_new_tokens", "a number below 2^31", ENDS, rules.number(most=INT32), "2147483648", ("min_tokens",)),
    _sampling("temperature", "a number", ERROR, FINITE, '"hot"'),
    _sampling("top_p", "a number", ERROR, FINITE, '"all"'),
    _sampling("min_p", "a number", ERROR, FINITE, "[0.1]"),
    _sampling(
        "top_k", "a number below 2^31; -1 for all", ENDS, rules.number(-INT32, INT32, "use -1 for all"), "2147483648"
    ),
    _sampling("frequency_penalty", "a number", ERROR, FINITE, '"a"'),
    _sampling("presence_penalty", "a number", ERROR, FINITE, '"a"'),
    _sampling(
        "repetition_penalty",
        "a number; divided by the temperature from 1e-35 on",
        ENDS,
        sampling_rules.repetition_penalty,
        "1e-300",
    ),
    _sampling(
        "n", f"a whole number up to {sampling_rules.MOST_SAMPLES}; null for 1", ERROR, sampling_rules.samples, '"2"'
    ),
    _sampling("stop", "a text or several", ERROR, rules.texts, "5"),
    _sampling(
        "stop_token_ids",
        "token ids; those beyond the vocabulary are left out",
        ENDS_TOGETHER,
        sampling_rules.ids_in_vocabulary,
        "5",
    ),
    _sampling("stop_regex", "regular expressions that compile", ERROR, sampling_rules.patterns, '"("'),
    _sampling("json_schema", "a text", ENDS, sampling_rules.grammar, '{"type": "object"}', ("response_format",)),
    _sampling("regex", "a text", ENDS, sampling_rules.grammar, '["a"]'),
    _sampling("ebnf", "a text", ENDS, sampling_rules.grammar, "[1]"),
    _sampling("structural_tag", "a text", ENDS, sampling_rules.grammar, '{"a": 1}'),
    _sampling("ignore_eos", "anything, by its truth", TYPED, rules.flag),
    _sampling("skip_special_tokens", "anything, by its truth", ENDS, rules.flag),
    _sampling("spaces_between_special_tokens", "anything, by its truth", ENDS_TOGETHER, rules.flag),
    _sampling("no_stop_trim", "anything, by its truth", TYPED, rules.flag),
    _sampling("stream_interval", "a number; null for the server's", ENDS, FINITE, '"often"'),
    _sampling(
        "logit_bias",
        "token ids and numbers that float32 can hold, or -infinity",
        ENDS,
        sampling_rules.logit_bias,
        '{"5": "a"}',
    ),
    _sampling("sampling_seed", "a number", ERROR, FINITE, also=("seed",)),
    _sampling("custom_params", "anything; `lsa` as in configuration.md", TYPED, sampling_rules.custom_params),
    _sampling(
        "beam_width", "1; null (0.5.23)", "refused with pages", rules.number(1, 1, "leave it out: no beam search")
    ),
    _sampling("ebnf_full_assistant", "anything, by its truth (0.5.23)", TYPED, rules.flag),
    _sampling("watermark", "as SGLang checks it (0.5.23)", "HTTP 400", rules.passed),
    _sampling("stop_strs", "not the client's: dropped", INTERNAL, rules.dropped),
    _sampling("stop_regex_strs", "not the client's: dropped", INTERNAL, rules.dropped),
    _sampling("stop_str_max_len", "not the client's: dropped", INTERNAL, rules.dropped),
    _sampling("stop_regex_max_len", "not the client's: dropped", INTERNAL, rules.dropped),
    _sampling("is_normalized", "not the client's: dropped", ENDS, rules.dropped),
)
"""Keys of ``sampling_params``. SGLang builds its message from them without looking at any type."""

_NOT_SPLIT = rules.unless(lambda server: server.disaggregated)
_NO_ENCODERS = rules.unless(lambda server: server.encoders)
FIELDS: tuple[Row, ...] = (
    Row(
        "rid",
        "a text of at least one character, that no running request has",
        OTHERS,
        field_rules.name_of_request,
        '""',
        also=("request_id",),
    ),
    Row("input_ids", "at least one id, each of the vocabulary", ENDS, field_rules.some_tokens, "[]"),
    Row("session_params", "an object of `id`, `rid`, `offset`, ...", ENDS, field_rules.session, '{"id": [1]}'),
    Row("extra_key", "a text", ENDS, rules.text, also=("cache_salt",)),
    Row("input_embeds", "rows of numbers, on a server in bfloat16", ENDS, field_rules.rows_of_floats),
    Row("logprob_start_len", "-1, or a position in the prompt", ENDS, field_rules.start_of_logprobs, "-2"),
    Row(
        "top_logprobs_num",
        "at most the vocabulary",
        ENDS,
        field_rules.top_logprobs,
        "60000",
        also=("top_logprobs", "logprobs"),
    ),
    Row("token_ids_logprob", "token ids, in any company", ENDS_TOGETHER, field_rules.given_logprobs),
    Row("positional_embed_overrides", "not in JSON", ENDS, field_rules.objects_only, '{"embeds": []}'),
    Row("multi_item_delimiter_indices", "positions; dropped unless `--enable-mis`", ENDS, field_rules.delimiters),
    Row(
        "token_indices_to_pool",
        "positions in the prompt; not given unless `--enable-mis` (0.5.23)",
        ENDS,
        field_rules.pooled,
    ),
    Row("custom_labels", "labels that the server's metrics have; others are left out", ENDS, field_rules.known_labels),
    Row("received_time", "a time of this server's clock, else dropped", INTERNAL, field_rules.timestamp),
    Row("http_worker_ipc", "not the client's: dropped", "the answer goes elsewhere", rules.dropped),
    Row("lora_id", "not the client's: dropped where there is LoRA", ENDS, rules.unless(lambda server: not server.lora)),
    Row("bootstrap_host", "dropped unless disaggregated", ENDS, _NOT_SPLIT),
    Row("bootstrap_port", "dropped unless disaggregated", INTERNAL, _NOT_SPLIT),
    Row("bootstrap_room", "dropped unless disaggregated", INTERNAL, _NOT_SPLIT),
    Row("bootstrap_pair_key", "dropped unless disaggregated", INTERNAL, _NOT_SPLIT),
    Row("decode_tp_size", "dropped unless disaggregated", INTERNAL, _NOT_SPLIT),
    Row("need_wait_for_mm_inputs", "dropped unless `--language-only`", INTERNAL, _NO_ENCODERS),
    Row("num_items_assigned", "dropped unless `--language-only`", INTERNAL, _NO_ENCODERS),
    Row("mm_data_mooncake", "dropped unless `--language-only`", INTERNAL, _NO_ENCODERS),
    Row("encoder_urls", "dropped unless `--language-only`", INTERNAL, _NO_ENCODERS),
)
"""Fields of one request, once SGLang has made one of each prompt of a batch."""

ROWS = (*SAMPLING, *FIELDS)
