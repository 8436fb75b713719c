"""A multi-turn agent whose memory grows from session to session, with the OpenAI client.

    python -m sglang_lsa.launch_server --port 30000 --lsa-min-context 1024        # in another terminal
    python examples/agent_sessions.py --sessions 4 --turns 2

Each session reads a report and then answers questions; everything said before stays in the context. A turn prints how
long the prompt is, how much of it the server found in its radix tree, and what its decode kept on the device.
"""

from __future__ import annotations

import argparse
import random
import uuid
from typing import Any

import openai

from sglang_lsa.client import NoServer, Savings, get_finished, get_status, savings

PLACES = ("harbor", "meadow", "orchard", "quarry", "valley", "garden", "market", "window")
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


def report(session: int, tokens: int) -> tuple[str, str, str]:
    """What a session brings in, about ``tokens`` long; where its number is from, and the number."""
    rng = random.Random(session)
    place, number = f"{rng.choice(PLACES)}-{session}", str(rng.randint(10**6, 10**7 - 1))
    lines = [FILLER] * (tokens // 25)
    lines.insert(rng.randint(0, len(lines)), f"One of the special magic numbers for {place} is: {number}.\n")
    return f"Report of session {session}:\n{''.join(lines)}", place, number


class Agent:
    """A conversation with a server: every turn is appended, nothing is ever cut off."""

    def __init__(self, url: str, max_tokens: int):
        self.url, self.max_tokens = url, max_tokens
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        self.model = self.client.models.list().data[0].id
        self.messages: list[Any] = []

    def say(self, text: str) -> tuple[str, Savings]:
        """Answer, and what the server needed for it."""
        rid = uuid.uuid4().hex
        self.messages.append({"role": "user", "content": text})
        answer = self.client.chat.completions.create(
            model=self.model,
            messages=self.messages,
            max_tokens=self.max_tokens,
            temperature=0,
            extra_body={"rid": rid},
        )
        said = answer.choices[0].message.content or ""
        self.messages.append({"role": "assistant", "content": said})
        return said.strip(), savings(get_status(self.url), get_finished(self.url, [rid]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--sessions", type=int, default=3)
    parser.add_argument("--turns", type=int, default=2, help="questions in each session")
    parser.add_argument("--tokens", type=int, default=2000, help="of each session's report")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer")
    args = parser.parse_args()
    get_status(args.url)
    agent, places = Agent(args.url, args.max_tokens), dict[str, str]()
    print(f"{'turn':>4} {'prompt':>7} {'cached':>7} {'resident':>14} {'on device':>10} {'in full':>9}  answer")
    total, turn = [], 0
    for session in range(1, args.sessions + 1):
        text, place, number = report(session, args.tokens)
        places[place] = number
        for asked in [place, *random.Random(session).choices(list(places), k=args.turns - 1)]:
            question = f"What is the special magic number for {asked} mentioned in the text above?"
            answer, saved = agent.say(f"{text}\n{question}" if text else question)
            text, turn = "", turn + 1
            total.append(saved)
            print(
                f"{turn:>4} {saved.prompt_tokens:>7,} {saved.cached_tokens:>7,} "
                f"{f'{saved.resident_pages} of {saved.context_pages}':>14} {saved.device_bytes / 1e6:>7.1f} MB "
                f"{saved.full_bytes / 1e6:>6.1f} MB  {'right' if places[asked] in answer else 'wrong'}: {answer!r:.60}"
            )
    last, prompts, cached = total[-1], sum(s.prompt_tokens for s in total), sum(s.cached_tokens for s in total)
    print(f"\nthe last turn: {last}")
    print(f"{cached:,} of {prompts:,} prompt tokens were found in the radix tree ({cached / prompts:.0%})")


if __name__ == "__main__":
    try:
        main()
    except (NoServer, openai.OpenAIError) as error:
        raise SystemExit(f"agent_sessions.py: {error}") from None
