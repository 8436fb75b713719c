"""The launcher switches LSA on and fills in a model, without overruling anybody."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from sglang_lsa.embedded_model import INDEXER_NAME, MODEL_NAME, embedded_model_path
from sglang_lsa.indexer.checkpoint import read_checkpoint_config
from sglang_lsa.launch_server import with_defaults
from sglang_lsa.patches.models import shape_of


def test_nothing_given_serves_the_embedded_model() -> None:
    assert with_defaults([]) == [
        *("--model-path", str(embedded_model_path())),
        *("--served-model-name", MODEL_NAME),
        *("--lsa-indexer", "smollm2-135m-instruct"),
        *("--lsa-budget", "0.135"),
    ]


def test_the_embedded_model_has_its_indexer() -> None:
    """It is the one of this model, and is taken however much of the rest is given."""
    folder = embedded_model_path()
    read_checkpoint_config(INDEXER_NAME).require_model(shape_of(AutoConfig.from_pretrained(folder)))
    given = ["--lsa-device-tokens", "6400", "--port", "1"]
    assert with_defaults(given)[4:] == ["--lsa-indexer", INDEXER_NAME, *given]


@pytest.mark.parametrize(
    "given",
    [
        *("--lsa-policy quest", "--lsa-pol=quest", "--lsa-indexer mine", "--lsa-calibrate cached"),
        *("--lsa-config c.json", "--lsa-record r", "--lsa-observe-layers 3,9"),
        *("--json-model-override-args {}", "--json-model-override {}", "--model-path m", "--model-pa m"),
    ],
)
def test_an_indexer_is_not_added_to_another_choice(given: str) -> None:
    assert INDEXER_NAME not in with_defaults(given.split())


def test_a_name_that_was_given_comes_last_and_wins() -> None:
    assert with_defaults(["--served-model-name", "mine"])[-2:] == ["--served-model-name", "mine"]


@pytest.mark.parametrize(
    "given", [["--model-path", "m"], ["--model-path=m"], ["--model", "m"], ["--model-p", "m"]], ids=" ".join
)
def test_a_model_that_was_given_is_kept(given: list[str]) -> None:
    assert with_defaults(given) == ["--lsa-budget", "0.135", *given]


def test_lsa_flags_that_were_given_are_enough() -> None:
    assert with_defaults(["--model", "m", "--lsa-policy", "recency"]) == ["--model", "m", "--lsa-policy", "recency"]
