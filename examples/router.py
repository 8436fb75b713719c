"""Agents over several servers: SGLang's router sends every turn to the server that has the agent's memory.

    pip install 'sglang-lsa[router]' sglang==0.5.17
    python -m sglang_lsa.launch_server --port 30000 --lsa-min-context 1024        # in another terminal
    python -m sglang_lsa.launch_server --port 30001 --lsa-min-context 1024        # in a third one
    python examples/router.py --url http://127.0.0.1:30000 --url http://127.0.0.1:30001

Every agent has a memory of its own, and asks about it several times, all of them at once. The first turn of each goes
to the server that has cached less, the others follow it, since prompts that begin the same go where they went before.
The router asks servers how full they are, too; those with LSA say it of their device pool. What it does not pass on is
in docs/parallel.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from sglang_lsa.client import get_requests, get_status, savings
from sglang_lsa.server_process import held_port

LINE = "Agent {agent} noted on day {day} that the stone number {stone} lay {way} of the old mill and was dry.\n"
WAYS = ("north", "east", "south", "west")


@contextmanager
def router(servers: list[str], policy: str, port: int | None) -> Iterator[str]:
    """A router before ``servers`` as long as the body runs; its address.

    Raises:
        RuntimeError: it did not come up.
    """
    held = [held_port() for _ in range(2)]
    ports = [port or held[0].getsockname()[1], held[1].getsockname()[1]]
    for each in held:  # the router sets no option by which it could listen beside them
        each.close()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(ports[0])]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(ports[1])]
    command += ["--policy", policy, "--log-level", "warn", "--worker-urls", *servers]
    url = f"http://127.0.0.1:{ports[0]}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                if process.poll() is not None:
                    log.seek(0)
                    said = log.read()[-1000:]
                    raise RuntimeError(f"the router ended: {said}\nIs it installed? pip install 'sglang-lsa[router]'")
                if len(workers(url)) == len(servers):
                    break
                time.sleep(0.1)
            else:
                raise RuntimeError(f"the router did not find all of {servers} in a minute")
            yield url
        finally:
            process.terminate()
            process.wait(30)


def workers(url: str) -> list[str]:
    """The healthy servers that a router knows; none while it starts."""
    try:
        with urllib.request.urlopen(f"{url}/workers", timeout=5) as answer:
            return [worker["url"] for worker in json.load(answer)["workers"] if worker["is_healthy"]]
    except (OSError, urllib.error.URLError):
        return []


def memory(agent: int, tokens: int) -> str:
    """A diary of about so many tokens."""
    days = range(tokens // 28)
    return "".join(LINE.format(agent=agent, day=day, stone=31 * day + agent, way=WAYS[day % 4]) for day in days)


def turn(url: str, agent: int, number: int, tokens: int) -> str:
    """Ask once; the name of the request."""
    rid = f"agent {agent}, turn {number}"
    text = memory(agent, tokens) + f"Question: where was the stone of day {10 + number}? Answer:"
    body = {"text": text, "rid": rid, "sampling_params": {"temperature": 0, "max_new_tokens": 16}}
    request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        json.load(answer)
    return rid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", action="append", required=True, help="of a server with LSA; give it again for others")
    parser.add_argument("--policy", default="cache_aware", help="of the router (cache_aware)")
    parser.add_argument("--port", type=int, help="of the router (any free one)")
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3, help="of each agent")
    parser.add_argument("--tokens", type=int, default=2000, help="of each memory")
    args = parser.parse_args()
    names = {}
    for url in args.url:
        get_status(url)  # says what to start if there is no such server
    with router(args.url, args.policy, args.port) as asked, ThreadPoolExecutor(args.agents) as clients:
        for number in range(args.turns):
            each = range(args.agents)
            turns = clients.map(lambda agent, number=number: turn(asked, agent, number, args.tokens), each)
            names.update({(agent, number): rid for agent, rid in enumerate(turns)})
    seen = {url: {entry["rid"]: entry for entry in get_requests(url)["finished"]} for url in args.url}
    for agent in range(args.agents):
        told = []
        for number in range(args.turns):
            where, entry = next((url, of[rid]) for url, of in seen.items() if (rid := names[agent, number]) in of)
            told.append(f"{where} had {entry['cached_tokens']} of {entry['prompt_tokens']} tokens")
        print(f"agent {agent}: " + "; ".join(told))
    for url, of in seen.items():
        served = [of[rid] for rid in names.values() if rid in of]
        print(f"{url}: {len(served)} turns, {savings(get_status(url), served)}" if served else f"{url}: no turn")


if __name__ == "__main__":
    main()
