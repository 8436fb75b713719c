"""SGLang's requests in the core's terms, and what the core decides of them written where SGLang looks for it.

The one place that knows what a ``Req`` looks like to the core; imports no SGLang. A ``Req`` carries three attributes of
ours: ``lsa_options``, what it asked for; ``lsa_key``, by what the core knows it while it is admitted; and
``lsa_warmed``, whether hot pages of its prefix were sent for while it waited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_lsa.config import RequestOptions
from sglang_lsa.engine.arrival import Arrival, Entry, Prompt
from sglang_lsa.engine.known_text import KnownText
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.patches.request_kv import committed_of, prefix_of, row_of

if TYPE_CHECKING:
    from sglang_lsa.engine.admission import Admission, Admitted
    from sglang_lsa.engine.runtime import LSARuntime

READS: dict[str, tuple[str, ...]] = {
    "sglang.srt.managers.schedule_batch.Req": (
        "extend_range",
        "extra_key",
        "finished",
        "finished_reason",
        "full_untruncated_fill_ids",
        "kv_committed_len",
        "last_node",
        "origin_input_ids",
        "output_ids",
        "prefix_indices",
        "req_pool_idx",
        "rid",
        "sampling_params",
    ),
    "sglang.srt.mem_cache.radix_cache.TreeNode": ("parent", "value"),
    "sglang.srt.sampling.sampling_params.SamplingParams": ("custom_params", "max_new_tokens"),
}
"""Attributes that are read or set here."""


def key_of(req: Any) -> str:
    """By what the core knows a request that was admitted; "" for one that was not.

    A client may use a ``rid`` again while the scheduler still has its first use: SGLang's HTTP process forgets it as
    soon as the client hangs up.
    """
    return getattr(req, "lsa_key", "")


# -- when it comes -----------------------------------------------------------------------------------------------------


def judge(admission: Admission, req: Any) -> str | None:
    """Why this request, which has just come, can never run, or None. Its answer is bounded if need be."""
    parameters = req.sampling_params
    verdict = admission.judge(Arrival(req.rid, req.origin_input_ids, parameters.custom_params))
    req.lsa_options = verdict.options
    if verdict.cache_key is not None:
        req.extra_key = verdict.cache_key
    if verdict.longest_answer is not None:
        parameters.max_new_tokens = min(parameters.max_new_tokens, verdict.longest_answer)
    return verdict.refusal


def options_of(admission: Admission, req: Any) -> RequestOptions:
    """What this request asked for, read once; SGLang may have aborted it before it was judged."""
    if not hasattr(req, "lsa_options"):
        req.lsa_options = admission.options(req.sampling_params.custom_params)
    return req.lsa_options


# -- while it waits ----------------------------------------------------------------------------------------------------


def prompt_of(admission: Admission, req: Any) -> Prompt:
    """A request that waits, as the radix tree matches it now."""
    prefix = prefix_of(req, admission.pager.page_index)
    tokens = len(req.full_untruncated_fill_ids)
    return Prompt(req.rid, options_of(admission, req), tokens, prefix, getattr(req, "lsa_warmed", False))


def choose(
    admission: Admission, req: Any, running: int, batch: Sequence[str], chunk_tokens: int | None
) -> Admitted | None:
    """How this prompt can be prefilled now, see :meth:`Admission.choose`; None if it must wait."""
    prompt = prompt_of(admission, req)
    found = admission.choose(prompt, running, batch, chunk_tokens)
    if found is None and not batch:
        admission.postpone(prompt)
        req.lsa_warmed = True
    return found


def promise(admission: Admission, req: Any, admitted: Admitted) -> None:
    """This prompt was admitted: keep device pages for it until it decodes."""
    req.lsa_key = admission.promise(req.rid, admitted, getattr(req, "lsa_warmed", False))


# -- when it runs ------------------------------------------------------------------------------------------------------


def entry_of(req: Any) -> Entry:
    """A request of which nothing was computed since it was admitted."""
    ids, new_tokens = req.full_untruncated_fill_ids, getattr(req.sampling_params, "max_new_tokens", None) or 0
    return Entry(req.rid, row_of(req), req.lsa_options, ids, new_tokens, text_of(req))


def text_of(req: Any) -> Callable[[int], np.ndarray]:
    """What tells the first token ids of a request, at most as many as asked for, or those that the scheduler knows."""
    text = KnownText()
    return lambda tokens: text.first(tokens, req.origin_input_ids, req.output_ids)


def can_decode(lsa: LSARuntime, reqs: Sequence[Any]) -> bool:
    """Whether every one of ``reqs`` that is about to open a page gets one."""
    return lsa.can_decode(committed_of(reqs))


def leaves_room(lsa: LSARuntime, reqs: Sequence[Any], chunked: Any, free: int) -> bool:
    """Whether a decode step of ``reqs`` can be before the next chunk of a prompt: the host keeps what the rest of that
    takes, as SGLang reckoned with when it admitted it, and nobody has to be retracted for what is promised to it.

    Args:
        chunked: of which a chunk was computed.
        free: tokens of the host mirror that can be had.
    """
    (done,), computed, page = committed_of([chunked]), committed_of(reqs), lsa.pager.page
    rest = pages_spanned(len(chunked.full_untruncated_fill_ids), page) - pages_spanned(done, page)
    opening = sum(tokens % page == 0 for tokens in computed)
    return opening + rest <= free // page and lsa.make_room(computed)


# -- when it goes ------------------------------------------------------------------------------------------------------


def is_complete(req: Any) -> bool:
    """Whether a request came to its end; not one that was aborted or retracted."""
    return bool(req.finished()) and req.finished_reason.to_json()["type"] != "abort"


def request_gone(lsa: LSARuntime, req: Any) -> None:
    """The request finished, was aborted or retracted; its KV is about to be released."""
    lsa.request_gone(key_of(req), is_complete(req))
    req.lsa_key, req.lsa_warmed = "", False
