"""A fuzz: requests with mutated fields, bodies and headers, against a real server that must answer them all and go on.

    python tests/support/fuzz.py --requests 10000 --seed 0      # starts its own server; `make test` runs a slice

Every field of every request comes from the server's own ``/openapi.json``; the sampling parameters from the screen's
table. A case is made of the seed and its number alone, so that a finding is repeated with ``--only NUMBER``.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import math
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fuzz_values import FITTING, HEADERS, NESTED, PARAMETERS, SCALARS
from serving import assert_idle
from soak import FLAGS, LSA_CONFIG
from tqdm import tqdm

from sglang_lsa.serve.control import CHANGEABLE
from sglang_lsa.serve.screen.table import SAMPLING
from sglang_lsa.server_process import LSA, ServerProcess

ANSWERS = {200, 400, 401, 403, 404, 405, 413, 415, 422}
"""Statuses that a client's own mistake may have."""
CLIENTS = 8
PATIENCE = 20
"""Seconds until a client hangs up; some mutations ask for long answers."""
LONG = 0.01
"""Share of cases that keep a mutated length."""

HI = [{"role": "user", "content": "Hello"}]
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "/generate": ("GenerateReqInput", {"text": "Hello", "sampling_params": {"max_new_tokens": 3}}),
    "/v1/completions": ("CompletionRequest", {"model": "m", "prompt": "Hello", "max_tokens": 3}),
    "/v1/chat/completions": ("ChatCompletionRequest", {"model": "m", "messages": HI, "max_tokens": 3}),
    "/v1/responses": ("ResponsesRequest", {"model": "m", "input": "Hello", "max_output_tokens": 5}),
    "/v1/messages": ("AnthropicMessagesRequest", {"model": "m", "messages": HI, "max_tokens": 3}),
    "/lsa/config": ("", {"budget": 0.2}),
}
"""Each with the name of its schema and a body that is answered."""
SHARES = {"/generate": 40, "/v1/completions": 14, "/v1/chat/completions": 22, "/v1/responses": 10, "/v1/messages": 4}
OPTIONS = (
    "budget",
    "policy",
    "enabled",
    "prefill",
    "sets",
    "record",
    "dense_steps",
    "prompt_lookup",
    "widen",
    "watch",
    "target_coverage",
    "max_budget",
    "other",
)
SETTINGS = (*CHANGEABLE, "window", "other")
LENGTHS = ("max_new_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens")

READS = (
    "/lsa",
    "/lsa/status",
    "/lsa/events",
    "/lsa/config",
    "/lsa/nothing",
    "/lsa/status?x=%ff",
    "/v1/models",
)
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")


@dataclass
class Case:
    """One request as it goes over the wire."""

    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Fuzz:
    """Makes cases, sends them, and judges the answers.

    Args:
        server: any LSA server.
        seed: everything random comes from it.
        seconds: after so many, the rest is not sent.
        settings: whether ``/lsa/config`` is among the routes; what it changed is put back by :meth:`run`.
    """

    def __init__(self, server: ServerProcess, seed: int = 0, settings: bool = True, seconds: float = math.inf):
        self.server, self.seed, self.end = server, seed, time.monotonic() + seconds
        schemas = server.get("/openapi.json")["components"]["schemas"]
        self.fields = {
            path: kinds(schemas[name]["properties"]) if name else {key: ["number", "string"] for key in SETTINGS}
            for path, (name, _) in ROUTES.items()
        }
        self.shares = SHARES | ({"/lsa/config": 4} if settings else {})

    def case(self, number: int) -> Case:
        """The case of this number."""
        rng = random.Random(f"{self.seed}:{number}")
        if rng.random() < 0.04:
            return Case(rng.choice(METHODS), rng.choice(READS), rng.choice((b"", b"{}", b"[")), self._headers(rng))
        path = rng.choices(list(self.shares), list(self.shares.values()))[0]
        body = json.loads(json.dumps(ROUTES[path][1]))
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
            self._mutate(rng, path, body)
        bounded(body, rng)
        content: Any = body if rng.random() < 0.97 else value(rng)
        return Case("POST", path, garbled(json.dumps(content).encode(), rng), self._headers(rng))

    def _headers(self, rng: random.Random) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if rng.random() < 0.15:
            headers |= [rng.choice(HEADERS)]
        return headers

    def _mutate(self, rng: random.Random, path: str, body: dict[str, Any]) -> None:
        """Another value for one field, or for one inside of a field that holds some."""
        inside = rng.random()
        if path == "/generate" and inside < 0.45:
            parameters = body.get("sampling_params")
            if isinstance(parameters, dict):
                name = rng.choice(sorted({str(row.sampling) for row in SAMPLING}))
                parameters[name] = value(rng, [PARAMETERS.get(name, "string")])
                return
        if path != "/lsa/config" and inside > 0.9:
            holder = body.setdefault("sampling_params", {}) if path == "/generate" else body
            if isinstance(holder, dict):
                holder["custom_params"] = {"lsa": {rng.choice(OPTIONS): value(rng)}}
                return
        name = rng.choice(list(self.fields[path]))
        if rng.random() < 0.05:
            body.pop(name, None)
        elif name in ("text", "prompt") and rng.random() < 0.5:
            body[name] = [rng.choice(("a", "Hello", "")) for _ in range(rng.choice((0, 1, 2, 3)))]
        elif name == "input_ids" and rng.random() < 0.7:
            body.pop("text", None)
            body[name] = rng.choice(([5] * 700, [[5, 6], [7]], [[5], []], [49151], [5] * 40))
        else:
            body[name] = value(rng, self.fields[path][name])

    def run(self, numbers: Iterable[int]) -> collections.Counter[str]:
        """Send the cases of these numbers; count the answers.

        Raises:
            AssertionError: answers that no client's mistake explains, or a server that does not go on.
        """
        before = self.server.get("/lsa/status")
        numbers = list(numbers)
        with ThreadPoolExecutor(CLIENTS) as clients:
            seen = list(tqdm(clients.map(self._one, numbers), total=len(numbers), desc="fuzz", mininterval=5))
        wrong = [
            f"case {number} of seed {self.seed}: {what}"
            for number, what in zip(numbers, seen, strict=True)
            if what[0] == "!"
        ]
        assert not wrong, f"{len(wrong)} findings:\n" + "\n".join(wrong[:30])
        if "/lsa/config" in self.shares:
            self.server.post("/lsa/config", {name: before["config"][name] for name in CHANGEABLE})
        assert_idle(self.server)
        answer = self.server.post(
            "/generate", {"text": "Hello", "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
        )
        assert answer["meta_info"]["completion_tokens"] == 2
        return collections.Counter(seen)

    def _one(self, number: int) -> str:
        """What became of a case: a status, or what is wrong after ``!``."""
        case = self.case(number)
        if time.monotonic() > self.end:
            return "not sent"
        if self.server.process.poll() is not None:
            return "! the server has ended"
        try:
            status, text = send(self.server.port, case)
        except TimeoutError:
            return "hung up"
        except (OSError, http.client.HTTPException) as error:
            return f"! {error!r} after {shown(case)}"
        if status not in ANSWERS or (status == 200 and b'"code": 500' in text.replace(b'"code":500', b'"code": 500')):
            return f"! HTTP {status} {text[:300]!r} to {shown(case)}"
        return f"HTTP {status}"


def kinds(properties: dict[str, Any]) -> dict[str, list[str]]:
    """Types that each property of a schema may have."""
    found = {}
    for name, schema in sorted(properties.items()):
        options = [schema, *schema.get("anyOf", [])]
        found[name] = [kind for option in options if (kind := option.get("type")) in FITTING] or ["string", "object"]
    return found


def value(rng: random.Random, types: Sequence[str] = ()) -> Any:
    """Something of a type that a field takes, or something that it may not expect."""
    if types and rng.random() < 0.6:
        return rng.choice(FITTING[rng.choice(types)])
    if rng.random() < 0.05:
        nested: Any = rng.choice(SCALARS)
        for _ in range(rng.choice((2, 20, 200))):
            nested = [nested] if rng.random() < 0.5 else {"a": nested}
        return nested if rng.random() < 0.5 else {"lsa": nested}
    return rng.choice(SCALARS if rng.random() < 0.6 else NESTED)


def bounded(body: dict[str, Any], rng: random.Random) -> None:
    """Most cases may not ask for much: the server is small, and the answers are not what is looked at."""
    if rng.random() < LONG:
        return
    for holder in (body, body.get("sampling_params")):
        for one in holder if isinstance(holder, list) else [holder]:
            if not isinstance(one, dict):
                continue
            for name in LENGTHS:
                length = one.get(name, 0)
                if length is None or (isinstance(length, int | float) and not isinstance(length, bool) and length > 16):
                    one[name] = 4
            if isinstance(one.get("n"), int | float) and 4 < one["n"] <= 20_000:
                one["n"] = 2
    if isinstance(body.get("sampling_params"), dict) and body.get("text") is not None:
        body["sampling_params"].setdefault("max_new_tokens", 4)


def garbled(content: bytes, rng: random.Random) -> bytes:
    """Now and then, bytes that are no JSON, or not the JSON that was meant."""
    chance = rng.random()
    if chance < 0.01:
        return content[: rng.randrange(len(content) + 1)]
    if chance < 0.02:
        at = rng.randrange(len(content) + 1)
        return content[:at] + bytes([rng.randrange(256)]) + content[at:]
    if chance < 0.023:
        return content.replace(b'"Hello"', b"[" * 5000 + b"]" * 5000)
    if chance < 0.025:
        return b"[" * rng.choice((100, 100_000))
    if chance < 0.03:
        return content.replace(b"Hello", rng.choice((b"\xff\xfe", b"\\ud800", b"\\u0000", b"NaN")))
    return content


def send(port: int, case: Case) -> tuple[int, bytes]:
    """Status and the first bytes of the answer.

    Raises:
        TimeoutError: it took longer than :data:`PATIENCE`, and the connection was closed.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.putrequest(case.method, case.path, skip_host="Host" in case.headers)
        headers = case.headers | {"Content-Length": str(len(case.body))}
        for name, text in headers.items():
            connection.putheader(name, text.encode("latin-1"))
        connection.endheaders(case.body)
        answer = connection.getresponse()
        endless = case.path.startswith("/lsa/events") and answer.status == 200
        return answer.status, answer.read(200) if endless else read(answer, PATIENCE)
    except TimeoutError:
        raise TimeoutError from None
    finally:
        connection.close()


def read(answer: http.client.HTTPResponse, seconds: float) -> bytes:
    """The whole answer, or what of a stream came within ``seconds``."""
    end, parts = time.monotonic() + seconds, []
    while part := answer.read1(65536):
        parts.append(part)
        if time.monotonic() > end:
            break
    return b"".join(parts)


def shown(case: Case) -> str:
    return f"{case.method} {case.path} {case.body[:400]!r} {case.headers}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="send no more after so many")
    parser.add_argument("--only", type=int, help="the number of one case, to repeat it")
    parser.add_argument("--log", type=pathlib.Path, help="where the server's log goes")
    args = parser.parse_args()
    from sglang_lsa.embedded_model import embedded_model_path

    numbers = [args.only] if args.only is not None else range(args.first, args.first + args.requests)
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder) / "lsa.json"
        config.write_text(json.dumps({**LSA_CONFIG, "debug": True}))
        flags = ["--model-path", str(embedded_model_path()), *FLAGS, "--lsa-config", str(config)]
        with ServerProcess(LSA, flags, args.log or pathlib.Path(folder) / "server.log") as server:
            fuzz = Fuzz(server.wait_until_ready(), args.seed, seconds=args.seconds)
            if args.only is not None:
                print(shown(fuzz.case(args.only)))
            try:
                print(dict(fuzz.run(numbers)))
            except AssertionError as error:
                print(error, server.log_tail(), sep="\n\n", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
