"""The launcher switches LSA on and fills in a model, without overruling anybody."""

from __future__ import annotations

import pytest

from sglang_lsa.embedded_model import MODEL_NAME, embedded_model_path
from sglang_lsa.launch_server import with_defaults


def test_nothing_given_serves_the_embedded_model() -> None:
    assert with_defaults([]) == [
        *("--model-path", str(embedded_model_path())),
        *("--served-model-name", MODEL_NAME),
        *("--lsa-budget", "0.135"),
    ]


def test_a_name_that_was_given_comes_last_and_wins() -> None:
    assert with_defaults(["--served-model-name", "mine"])[-2:] == ["--served-model-name", "mine"]


@pytest.mark.parametrize("given", [["--model-path", "m"], ["--model-path=m"], ["--model", "m"]], ids=" ".join)
def test_a_model_that_was_given_is_kept(given: list[str]) -> None:
    assert with_defaults(given) == ["--lsa-budget", "0.135", *given]


def test_lsa_flags_that_were_given_are_enough() -> None:
    assert with_defaults(["--model", "m", "--lsa-policy", "recency"]) == ["--model", "m", "--lsa-policy", "recency"]
