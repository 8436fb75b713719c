"""An agent with a long memory that thinks in parallel branches: SGLang's frontend language on a server with LSA.

    python -m sglang_lsa.launch_server --port 30000        # in another terminal
    python examples/agent_branches.py --branches 8
    python examples/agent_branches.py --memory notes.txt --ask "Who paid?" --ask "When?" --chat-template chatml

The memory is computed once and lies on the host once, whatever the number of branches; on the device each branch keeps
only the pages it reads; a server that forms groups (on one GPU by itself, else ``--lsa-config '{"groups": true}'``)
reads those that several chose once for all. The last lines count what the whole server did, so nobody else should ask
it meanwhile.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import threading

import sglang as sgl

from sglang_lsa.client import NoServer, get_finished, get_status, savings, work

KINDS = ("amber", "brisk", "calm", "daring", "eager", "fuzzy", "gentle", "hollow", "ivory", "jolly", "keen")
NAMES = ("falcon", "harbor", "lantern", "meadow", "orchard", "pebble", "quarry", "ribbon", "saddle", "timber")
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


@sgl.function
def agent(s, memory: str, questions: list[str], max_tokens: int):
    """Every branch continues after the same memory; ``fork`` has it computed before they start."""
    s += sgl.user_begin() + memory
    s.sync()  # SGLang's fork has a text computed only if it is there already
    branches = s.fork(len(questions))
    for branch, question in zip(branches, questions, strict=True):
        branch += question + sgl.user_end()
        branch += sgl.assistant(sgl.gen("answer", max_tokens=max_tokens, temperature=0))
    branches.join()
    s["answers"] = [branch["answer"] for branch in branches]
    s["rids"] = [branch.get_meta_info("answer")["id"] for branch in branches]


def made_up_memory(tokens: int, branches: int) -> tuple[str, list[str]]:
    """A log of about ``tokens`` tokens with a number for each branch in it, and a question for each."""
    rng = random.Random(0)
    lines = [FILLER] * max(branches, tokens // 25)
    names = [f"{KINDS[i % len(KINDS)]}-{NAMES[i % len(NAMES)]}" for i in range(branches)]
    for i, name in enumerate(names):
        at = round((i + 0.5) / branches * len(lines))
        lines.insert(at, f"One of the special magic numbers for {name} is: {rng.randint(10**6, 10**7 - 1)}.\n")
    return "".join(lines), [
        f"What is the special magic number for {name} mentioned in the text above?" for name in names
    ]


class DevicePages(threading.Thread):
    """Watches how many device pages all requests need together, pages that they share counted once."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.url, self.most, self.context, self.over = url, 0, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            try:
                status = get_status(self.url)
            except NoServer:
                return  # the branches fail, too, and report it
            context = status["running"]["context_pages"]
            if not status["running"]["dense"] and context > self.context:  # all past their prompts, more than before
                self.most, self.context = status["physical"]["held"], context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument(
        "--memory", type=pathlib.Path, help="a text file; default: filler with a number for each branch"
    )
    parser.add_argument("--ask", action="append", help="one branch's question about --memory; can be given again")
    parser.add_argument("--branches", type=int, default=8, help="without --memory")
    parser.add_argument("--tokens", type=int, default=6000, help="of the memory, without --memory")
    parser.add_argument("--max-tokens", type=int, default=40, help="of an answer")
    parser.add_argument("--chat-template", default="chatml", help="of the model, by SGLang's name for it")
    args = parser.parse_args()
    if bool(args.memory) != bool(args.ask):
        parser.error("--memory and --ask belong together")
    if not 1 <= args.branches <= 64:
        parser.error(f"--branches {args.branches} is out of range: use 1 to 64")
    memory, questions = made_up_memory(args.tokens, args.branches)
    if args.memory:
        memory, questions = args.memory.read_text() + "\n", args.ask
    before = get_status(args.url)
    size = f"{len(questions)} branches over one memory of {len(memory):,} characters"
    seen = f"see {args.url}/lsa" + (" for who reads what together" if before["groups"] else "")
    print(f"{size}: minutes on a CPU (less with fewer --branches and --tokens); {seen}", flush=True)
    sgl.set_default_backend(sgl.RuntimeEndpoint(args.url, chat_template_name=args.chat_template))
    watch = DevicePages(args.url)
    watch.start()
    state = agent.run(memory, questions, args.max_tokens)
    watch.over.set()
    watch.join()
    after = get_status(args.url)
    for question, answer in zip(questions, state["answers"], strict=True):
        print(f"{question}\n    {answer.strip()}")
    saved, done, page = savings(after, get_finished(args.url, state["rids"])), work(before, after), after["page_bytes"]
    print(f"\n{saved.requests} branches, each for itself: {saved}")
    if watch.context:
        print(f"at once, shared pages counted once: {watch.most} device pages ({watch.most * page / 1e6:.1f} MB)")
    if groups := after["groups"]:
        steps, saved_reads, added = (
            groups[name] - before["groups"][name] for name in ("steps", "saved_reads", "added_reads")
        )
        print(
            f"read once for all that chose it: {saved_reads:,} pages not read again in {steps} steps, {added:,} added"
        )
    print(f"on the host once: {done.stored_pages} pages copied ({done.stored_bytes / 1e6:.1f} MB) for all branches")
    print(f"the radix tree had {done.hit_tokens:,} of {done.prompt_tokens:,} prompt tokens ({done.hit_share:.0%})")


if __name__ == "__main__":
    try:
        main()
    except (NoServer, RuntimeError) as error:
        raise SystemExit(f"agent_branches.py: {error}") from None
