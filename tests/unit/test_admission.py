"""Admission: which requests are refused, and how a prompt that is admitted is prefilled."""

from __future__ import annotations

from array import array

import pytest
from admission_server import CHUNK, PHYSICAL, Server, how
from harness import request

from sglang_lsa.config import PAGE_SIZE
from sglang_lsa.engine.reading import IN_PLACE, RESIDENT, STREAMED
from sglang_lsa.indexer.expectation import Expectation
from sglang_lsa.memory.pages import pages_spanned
from sglang_lsa.patches.requests import judge, promise

ROOM = (PHYSICAL - 1) * PAGE_SIZE
"""Tokens that an idle server takes in place are fewer than this, or as many."""

# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_prompt_without_tokens_is_refused() -> None:
    """SGLang lets an empty text pass in some ways, and a share of no pages is no number."""
    req = request(1)
    req.origin_input_ids = array("q")
    assert judge(Server().admission, req) == "The prompt has no tokens: send at least one."


DENSE: list[dict[str, object]] = [{"enabled": False}, {"budget": 1.0}, {"policy": "full"}]


@pytest.mark.parametrize("lsa", DENSE, ids=str)
@pytest.mark.parametrize("tokens", [ROOM, ROOM + 1, 100 * PAGE_SIZE])
def test_a_dense_prompt_that_the_pool_cannot_take_is_refused(tokens: int, lsa: dict[str, object]) -> None:
    reason = judge(Server().admission, request(tokens, **lsa))
    assert reason == (
        f"The prompt has {tokens} tokens ({pages_spanned(tokens, PAGE_SIZE)} pages of KV) and asks to read all of them "
        f"in decode; the device pool takes fewer than {ROOM}. Ask for a budget below 1 and a policy other than full, "
        "shorten the prompt, or start the server with a larger --lsa-device-tokens."
    )


@pytest.mark.parametrize("lsa", DENSE, ids=str)
@pytest.mark.parametrize(("tokens", "answer"), [(1, ROOM - 1), (1000, ROOM - 1000), (ROOM - 1, 1)])
def test_prompt_and_answer_of_a_dense_request_fit_the_pool(tokens: int, answer: int, lsa: dict[str, object]) -> None:
    """It may be retracted at any time, and is then prefilled with what it generated."""
    server, req = Server(), request(tokens, **lsa)
    assert judge(server.admission, req) is None
    assert req.sampling_params.max_new_tokens == answer
    req.sampling_params.max_new_tokens = 1
    assert judge(server.admission, req) is None
    assert req.sampling_params.max_new_tokens == 1


@pytest.mark.parametrize(
    "lsa",
    [{}, {"budget": 0.99}, {"prefill": "resident"}, {"sets": "65:1:0", "budget": 1.0}],
    ids=["default", "budget", "resident", "sets"],
)
@pytest.mark.parametrize("tokens", [1, ROOM, 180 * PAGE_SIZE])
def test_requests_that_can_be_pruned_may_be_of_any_length(tokens: int, lsa: dict[str, object]) -> None:
    server, req = Server(), request(tokens, **lsa)
    assert judge(server.admission, req) is None
    assert req.sampling_params.max_new_tokens == 10_000, "their answers, too"


@pytest.mark.parametrize(("tokens", "refused"), [(ROOM - 1, False), (ROOM, True), (180 * PAGE_SIZE, True)])
def test_without_chunks_a_prompt_must_fit(tokens: int, refused: bool) -> None:
    reason = judge(Server(chunk=None).admission, request(tokens))
    if not refused:
        assert reason is None
        return
    assert reason is not None
    for words in (
        f"The prompt has {tokens} tokens ({pages_spanned(tokens, PAGE_SIZE)} pages of KV)",
        f"without chunked prefill the device pool takes prompts of fewer than {ROOM}",
        f"Start the server with --chunked-prefill-size {ROOM // 2} or so, or with a larger --lsa-device-tokens",
    ):
        assert words in reason


@pytest.mark.parametrize("lsa", [{"budget": 7}, {"policy": "best"}, {"sets": "all"}, {"odd": 1}], ids=str)
def test_what_no_request_can_ask_for_is_refused_in_the_same_words(lsa: dict[str, object]) -> None:
    """The HTTP process refuses it first; an Engine may not."""
    from sglang_lsa.config import RequestOptions

    server = Server()
    with pytest.raises(ValueError) as error:
        RequestOptions.parse({"lsa": lsa}, server.config, PAGE_SIZE, False)
    assert judge(server.admission, request(100, **lsa)) == str(error.value)


@pytest.mark.parametrize(
    ("ids", "wrong"),
    [([0, 99], None), ([5, 100, 101], 100), ([-1], -1), ([1 << 40], 1 << 40)],
    ids=["fine", "too large", "negative", "far too large"],
)
def test_token_ids_that_the_model_does_not_have_are_refused(ids: list[int], wrong: int | None) -> None:
    """It would read past its embeddings."""
    server, req = Server(), request(1)
    req.origin_input_ids = array("q", ids)
    assert judge(server.admission, req) is None, "nobody said how many there are"
    server.admission.vocabulary = 100
    expected = None if wrong is None else f"The prompt has the token id {wrong}: use ids from 0 to 99."
    assert judge(server.admission, req) == expected


# --- how a prompt is prefilled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "held", "running", "expected"),
    [
        # Of 24 device pages, each running request may open one, and so may this one.
        pytest.param(3, 0, 0, (IN_PLACE, 3, None), id="short"),
        pytest.param(23, 0, 0, (IN_PLACE, 23, None), id="all but one"),
        pytest.param(24, 0, 0, (STREAMED, 12, CHUNK), id="all"),
        pytest.param(90, 0, 0, (STREAMED, 12, CHUNK), id="beyond the pool"),
        pytest.param(13, 10, 0, (IN_PLACE, 13, None), id="beside held pages"),
        pytest.param(14, 10, 0, (STREAMED, 7, CHUNK), id="held pages are in the way"),
        pytest.param(10, 10, 3, (IN_PLACE, 10, None), id="beside running requests"),
        pytest.param(11, 10, 3, (STREAMED, 5, CHUNK), id="running requests grow"),
        pytest.param(5, 20, 0, None, id="no room for a chunk"),
        pytest.param(90, 12, 0, None, id="no room for a set"),
        pytest.param(90, 11, 0, (STREAMED, 12, CHUNK), id="just room for a set"),
        pytest.param(3, 20, 0, (IN_PLACE, 3, None), id="short, just fits"),
        pytest.param(3, 21, 0, None, id="short prompts wait"),
    ],
)
def test_in_place_when_it_fits_else_streamed_else_later(
    pages: int, held: int, running: int, expected: tuple[str, int, int | None] | None
) -> None:
    server = Server()
    server.hold("running", held)
    assert how(server.choose(request(pages * PAGE_SIZE), running)) == expected
    assert server.admission.waits == int(expected is None)


def test_a_page_that_is_begun_is_a_page() -> None:
    server = Server()
    assert how(server.choose(request(6 * PAGE_SIZE + 1))) == (IN_PLACE, 7, None)
    server.hold("running", 18)
    assert how(server.choose(request(5 * PAGE_SIZE))) == (IN_PLACE, 5, None)
    assert server.choose(request(5 * PAGE_SIZE + 1)) is not None
    assert how(server.choose(request(6 * PAGE_SIZE))) == (STREAMED, 5, CHUNK), "a chunk, and a page that it goes on in"


@pytest.mark.parametrize("lsa", DENSE, ids=str)
def test_dense_prompts_wait_until_they_fit(lsa: dict[str, object]) -> None:
    server = Server()
    server.hold("running", 10)
    assert how(server.choose(request(13 * PAGE_SIZE, **lsa))) == (IN_PLACE, 13, None)
    assert server.choose(request(14 * PAGE_SIZE, **lsa)) is None
    server.pager.forget("running")
    assert how(server.choose(request(13 * PAGE_SIZE, **lsa))) == (IN_PLACE, 13, None)


@pytest.mark.parametrize("prefill", ["exact", "resident"])
def test_prompts_that_are_too_short_to_be_pruned_wait_until_they_fit(prefill: str) -> None:
    server = Server(min_context=10 * PAGE_SIZE)
    server.hold("running", 15)
    assert server.choose(request(10 * PAGE_SIZE - 1, prefill=prefill)) is None
    assert how(server.choose(request(10 * PAGE_SIZE, prefill=prefill))) == (STREAMED, 5, CHUNK)


@pytest.mark.parametrize(
    ("chunk", "tokens", "expected"),
    [
        # 20 pages are free beside this request: 24 pages of the pool, of which 3 are held.
        pytest.param(CHUNK, 90 * PAGE_SIZE, (STREAMED, 12, CHUNK), id="SGLang's chunk"),
        pytest.param(20 * PAGE_SIZE, 90 * PAGE_SIZE, (STREAMED, 13, 12 * PAGE_SIZE), id="half of the pool at most"),
        pytest.param(PAGE_SIZE + 1, 90 * PAGE_SIZE, (STREAMED, 12, 2 * PAGE_SIZE), id="a page and a token"),
        pytest.param(10, 90 * PAGE_SIZE, (STREAMED, 12, PAGE_SIZE), id="less than a page"),
        pytest.param(90 * PAGE_SIZE, 21 * PAGE_SIZE, (STREAMED, 13, 12 * PAGE_SIZE), id="the prompt"),
    ],
)
def test_chunks_of_a_streamed_prompt(chunk: int, tokens: int, expected: tuple[str, int, int]) -> None:
    server = Server(chunk)
    server.hold("running", 3)
    assert how(server.choose(request(tokens))) == expected


@pytest.mark.parametrize(
    ("pages", "held", "expected"),
    [
        pytest.param(12, 8, (IN_PLACE, 12, None), id="fits"),
        pytest.param(12, 12, None, id="as long as half of the pool, waits for a chunk of it"),
        pytest.param(11, 12, (IN_PLACE, 11, None), id="just fits"),
        pytest.param(10, 13, (IN_PLACE, 10, None), id="in place first"),
        pytest.param(13, 12, None, id="more than one pass could stream"),
    ],
)
def test_without_chunks_one_pass_computes_a_prompt(
    pages: int, held: int, expected: tuple[str, int, int | None] | None
) -> None:
    server = Server(chunk=None)
    server.hold("running", held)
    assert how(server.choose(request(pages * PAGE_SIZE))) == expected


def test_without_chunks_what_is_new_may_be_streamed() -> None:
    """A short question about a long prefix."""
    server = Server(chunk=None)
    prefix = server.memory_in_the_mirror_only(30)
    assert how(server.choose(request(33 * PAGE_SIZE, prefix))) == (STREAMED, 12, 3 * PAGE_SIZE)


# --- prefixes that the radix tree has --------------------------------------------------------------------------------


def test_prefix_pages_that_others_hold_cost_nothing() -> None:
    server = Server()
    prefix = server.memory(10)
    assert server.pager.hold("running", prefix[:6])
    admitted = server.choose(request(12 * PAGE_SIZE, prefix))
    assert how(admitted) == (IN_PLACE, 6, None)
    assert admitted is not None and admitted.prefix.tolist() == prefix.tolist()


@pytest.mark.parametrize("where", ["memory", "memory_in_the_mirror_only"], ids=["cached", "cached_in_the_mirror_only"])
def test_other_prefix_pages_cost_as_much_as_new_ones(where: str) -> None:
    """Also those on the device: they can no longer be given up."""
    server = Server()
    prefix = getattr(server, where)(10)
    assert how(server.choose(request(12 * PAGE_SIZE, prefix))) == (IN_PLACE, 12, None)


def test_a_prefix_that_was_promised_in_this_pass_costs_nothing() -> None:
    server = Server()
    prefix = server.memory(10)
    first = request(12 * PAGE_SIZE, prefix, "first")
    admitted = server.choose(first)
    assert admitted is not None
    promise(server.admission, first, admitted)
    second = request(13 * PAGE_SIZE, prefix, "second")
    assert how(server.choose(second, 1, [IN_PLACE])) == (IN_PLACE, 3, None)
    server.admission.batch_formed()
    assert server.choose(second, 1) is not None
    assert how(server.choose(second, 1)) == (STREAMED, 6, 3 * PAGE_SIZE)


def test_only_prompts_in_place_bring_in_the_prefix_of_others() -> None:
    server = Server()
    prefix = server.memory(30)
    first = request(33 * PAGE_SIZE, prefix, "first")
    admitted = server.choose(first)
    assert how(admitted) == (STREAMED, 12, 3 * PAGE_SIZE)
    assert admitted is not None
    promise(server.admission, first, admitted)
    assert server.admission._new_pages(prefix, 33) == 33


# --- over a resident prefix ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cached", "pages", "held", "expected"),
    [
        pytest.param(20, 22, 0, (RESIDENT, 11 + 2 + 1, 2 * PAGE_SIZE), id="a long prefix"),
        pytest.param(40, 42, 0, (RESIDENT, 12 + 2 + 1, 2 * PAGE_SIZE), id="beyond the pool"),
        pytest.param(40, 50, 0, (RESIDENT, 12 + 10 + 1, CHUNK), id="more of its own than a chunk"),
        pytest.param(40, 52, 0, (STREAMED, 12, CHUNK), id="more of its own than the pool takes"),
        pytest.param(40, 42, 8, (RESIDENT, 15, 2 * PAGE_SIZE), id="just room"),
        pytest.param(40, 42, 9, None, id="waits, and is not streamed instead"),
        pytest.param(3, 20, 0, (IN_PLACE, 20, None), id="a prefix below min_context"),
        pytest.param(4, 8, 0, (IN_PLACE, 8, None), id="a prefix no larger than a set"),
        pytest.param(5, 8, 0, (RESIDENT, 4 + 3 + 1, 3 * PAGE_SIZE), id="a prefix just larger than a set"),
        pytest.param(0, 90, 0, (STREAMED, 12, CHUNK), id="no prefix"),
    ],
)
def test_over_a_resident_prefix(
    cached: int, pages: int, held: int, expected: tuple[str, int, int | None] | None
) -> None:
    server = Server()
    prefix = server.memory_in_the_mirror_only(cached)
    server.hold("running", held)
    assert how(server.choose(request(pages * PAGE_SIZE, prefix, prefill="resident"))) == expected


def test_the_request_chooses_how_its_prefix_is_read() -> None:
    server = Server(prefill="resident")
    prefix = server.memory_in_the_mirror_only(40)
    assert how(server.choose(request(42 * PAGE_SIZE, prefix))) == (RESIDENT, 15, 2 * PAGE_SIZE)
    for lsa, way in (({"prefill": "exact"}, STREAMED), ({"budget": 0.1}, RESIDENT)):
        admitted = server.choose(request(42 * PAGE_SIZE, prefix, **lsa))
        assert admitted is not None and admitted.how == way
    assert server.choose(request(22 * PAGE_SIZE, prefix[:20], enabled=False)).how == IN_PLACE  # type: ignore[union-attr]


def test_the_budget_of_the_request_sizes_the_set() -> None:
    server = Server()
    prefix = server.memory_in_the_mirror_only(40)
    options = {"prefill": "resident", "budget": 0.1}
    assert how(server.choose(request(42 * PAGE_SIZE, prefix, **options))) == (RESIDENT, 4 + 2 + 1, 2 * PAGE_SIZE)
    assert how(server.choose(request(100 * PAGE_SIZE, budget=0.01))) == (STREAMED, 5, CHUNK)


# --- company ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "batch", "admitted"),
    [
        (IN_PLACE, [], True),
        (IN_PLACE, [IN_PLACE, IN_PLACE], True),
        (IN_PLACE, [STREAMED], False),
        (IN_PLACE, [RESIDENT], False),
        (STREAMED, [], True),
        (STREAMED, [IN_PLACE], False),
        (STREAMED, [STREAMED], False),
        (STREAMED, [RESIDENT], False),
        (RESIDENT, [], True),
        (RESIDENT, [RESIDENT, RESIDENT], True),
        (RESIDENT, [IN_PLACE], False),
        (RESIDENT, [RESIDENT, IN_PLACE], False),
        (RESIDENT, [STREAMED], False),
    ],
)
def test_who_is_prefilled_together(kind: str, batch: list[str], admitted: bool) -> None:
    server = Server()
    prefix = server.memory_in_the_mirror_only(20)
    req = {
        IN_PLACE: request(3 * PAGE_SIZE),
        STREAMED: request(90 * PAGE_SIZE),
        RESIDENT: request(21 * PAGE_SIZE, prefix, prefill="resident"),
    }[kind]
    found = server.choose(req, len(batch), batch)
    assert (found is not None) is admitted
    assert found is None or found.how == kind
    assert server.admission.waits == 0, "a prompt that only comes with the next pass did not wait for pages"


# --- a budget of auto ------------------------------------------------------------------------------------------------

FEW = Expectation(((0.0, 0.0, 0.0), (1.0, 1.0, 0.05)), "a test")


def sized(expectation: Expectation | None = FEW, **options: object) -> Server:
    server = Server(indexer="x", policy="indexer", **({"budget": "auto", "max_budget": 0.5} | options))
    server.lookahead.rules.thresholds = {"indexer": 0.0}
    server.lookahead.rules.expectations = {} if expectation is None else {"indexer": expectation}
    return server


def test_what_a_set_is_expected_to_take_is_promised_not_the_most_that_it_may() -> None:
    """90 pages: 12 at most, half of the pool; first and last ones, and what covers 0.6 of the attention, are 7."""
    server = sized()
    assert how(server.choose(request(90 * PAGE_SIZE))) == (STREAMED, 7, CHUNK)
    assert how(server.choose(request(90 * PAGE_SIZE, target_coverage=1.0))) == (STREAMED, 9, CHUNK)
    assert how(server.choose(request(90 * PAGE_SIZE, budget=0.5))) == (STREAMED, 12, CHUNK)
    assert how(server.choose(request(90 * PAGE_SIZE, max_budget=0.07))) == (STREAMED, 5, CHUNK)
    assert how(Server().choose(request(90 * PAGE_SIZE))) == (STREAMED, 12, CHUNK)


def test_a_resident_prefix_is_what_is_expected_too() -> None:
    server = sized(prefill="resident")
    pages = server.memory_in_the_mirror_only(60)
    req = request(61 * PAGE_SIZE, prefix=pages)
    fixed = Server(prefill="resident")
    same = request(61 * PAGE_SIZE, prefix=fixed.memory_in_the_mirror_only(60))
    found, whole = server.choose(req), fixed.choose(same)
    assert found is not None and whole is not None and found.how == whole.how == RESIDENT
    assert found.demand == 6 + 1 + 1 and whole.demand == 12 + 1 + 1


def test_auto_is_refused_where_nobody_knows_what_sets_cover() -> None:
    server = sized()
    assert judge(server.admission, request(100)) is None
    assert judge(server.admission, request(100, policy="full")) is None
    reason = judge(server.admission, request(100, policy="recency"))
    assert reason is not None and "auto does not go with the policy recency" in reason
    assert judge(server.admission, request(100, policy="recency", budget=0.2)) is None
    reason = judge(sized(None, budget=0.2).admission, request(100, budget="auto"))
    assert reason is not None and "has no expectation: add it with sglang-lsa calibrate" in reason
