"""Runs inside a server's sampler: writes down what is likely next, and makes the answer go along given tokens.

A custom logit processor of SGLang (``--enable-custom-logit-processor``), named by requests, see :data:`PROCESSOR`.
What it writes comes back with the answer, as ``meta_info[NAME]``: one text a token. Imports no SGLang.

The request's ``custom_params`` have, under :data:`NAME`, one of

* ``{"top": K}``: nothing is forced; written are the K likeliest next tokens and their log-probabilities.
* ``{"tokens": [...], "ids": [...]}``: the answer is ``tokens``; written are the log-probabilities of the ids that a
  request of the first kind has written for the same place.
"""

from __future__ import annotations

import base64
import json
import pickle
from typing import Any

import numpy as np
import torch

from sglang_lsa.patches.request_kv import prefilled_of

NAME = "sglang_lsa_next"


class Forced:
    """The processor; holds nothing, since SGLang makes one for every batch."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]]) -> torch.Tensor:
        """``logits [requests, vocabulary]``, returned with the forced tokens on top."""
        told = torch.log_softmax(logits.float(), dim=-1)
        for row, params in enumerate(custom_param_list):
            asked, request = params[NAME], params["__req__"]
            if prefilled_of(request) < len(request.full_untruncated_fill_ids):
                continue  # a chunk in the middle of the prompt: SGLang samples after it, and throws the token away
            request.customized_info = request.customized_info or {}
            written: list[str] = request.customized_info.setdefault(NAME, [])
            place = len(written)  # not that of the request's tokens: the scheduler may not have read the last one yet
            if "top" in asked:
                best = told[row].topk(asked["top"])
                written.append(packed(best.indices.cpu().numpy(), best.values.cpu().numpy()))
            elif place < len(asked["tokens"]):
                ids, _ = unpacked(asked["ids"][place])
                chosen = torch.from_numpy(ids.astype(np.int64)).to(told.device)
                written.append(packed(ids, told[row, chosen].cpu().numpy()))
                logits[row, asked["tokens"][place]] = torch.finfo(logits.dtype).max
            else:
                written.append("")  # a pass that was queued before the end was known; nobody reads it
        return logits


PROCESSOR = json.dumps({"callable": pickle.dumps(Forced).hex()})
"""Names the class, as a request's ``custom_logit_processor``; the server imports it from this package."""


def packed(ids: np.ndarray, logprobs: np.ndarray) -> str:
    """Token ids and their log-probabilities as text, to the bit."""
    return base64.b64encode(ids.astype("<i4").tobytes() + logprobs.astype("<f4").tobytes()).decode()


def unpacked(text: str) -> tuple[np.ndarray, np.ndarray]:
    """int32 ``[K]`` and float32 ``[K]``, as they were packed."""
    data = base64.b64decode(text)
    return np.frombuffer(data[: len(data) // 2], "<i4"), np.frombuffer(data[len(data) // 2 :], "<f4")
