"""What SGLang can only do while it is idle waits until it is, instead of ending the server."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook

PAUSED = (
    "{count} requests are paused, and their KV would be of the old weights: send flush_cache=false to go on with it, "
    "or pause with mode=abort first"
)


def wait_until_idle(self, recv_reqs):
    """Hold back what needs an idle server, and new work behind it; the rest passes.

    SGLang's HTTP process lets every request end before it updates weights, but the scheduler forgets a finished request
    one pass later. And requests of other HTTP processes, and paused ones, are not waited for at all.
    """
    held: list = []
    ready: list = []
    starts_work = False
    for message in [*self.__dict__.get("lsa_held", ()), *recv_reqs]:
        if held and is_abort(message):
            ready.append(message)  # of what runs
            held.append(message)  # and of what is held
        elif held and (needs_idle(message) or is_work(message)):
            held.append(message)
        elif needs_idle(message) and (starts_work or not self.is_fully_idle()):
            if not self._engine_paused or starts_work:
                held.append(message)
            elif count := unfinished(self):
                if answer := answers().get(type(message)):
                    told = answer(success=False, message=PAUSED.format(count=count))
                    self.ipc_channels.send_to_tokenizer.send_output(told, message)
                else:
                    held.append(message)  # its answer has no room for an error
            else:
                forget_finished(self)
                ready.append(message)
        else:
            ready.append(message)
            starts_work = starts_work or is_work(message)
    self.lsa_held = held
    return (self, ready), {}


def needs_idle(message):
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

    return isinstance(message, ReleaseMemoryOccupationReqInput) or (type(message) in answers() and message.flush_cache)


def is_work(message):
    from sglang.srt.managers import io_struct

    return isinstance(
        message,
        (
            io_struct.TokenizedGenerateReqInput,
            io_struct.TokenizedEmbeddingReqInput,
            io_struct.BatchTokenizedGenerateReqInput,
            io_struct.BatchTokenizedEmbeddingReqInput,
        ),
    )


def is_abort(message):
    from sglang.srt.managers.io_struct import AbortReq

    return isinstance(message, AbortReq)


def answers():
    """By the type of a message that brings new weights: the type of its answer."""
    from sglang.srt.managers import io_struct

    return {
        io_struct.UpdateWeightFromDiskReqInput: io_struct.UpdateWeightFromDiskReqOutput,
        io_struct.UpdateWeightsFromDistributedReqInput: io_struct.UpdateWeightsFromDistributedReqOutput,
        io_struct.UpdateWeightsFromTensorReqInput: io_struct.UpdateWeightsFromTensorReqOutput,
        io_struct.UpdateWeightsFromIPCReqInput: io_struct.UpdateWeightsFromIPCReqOutput,
    }


def unfinished(scheduler):
    """Requests that wait, or would go on if the scheduler were not paused."""
    batches = (scheduler.running_batch, scheduler.last_batch)
    running = {req for batch in batches if batch is not None for req in batch.reqs if not req.finished()}
    return len(scheduler.waiting_queue) + len(running)


def forget_finished(scheduler):
    """What the next pass would do, where a pause keeps it from coming."""
    while scheduler.enable_overlap and scheduler.result_queue:
        scheduler.process_batch_result(*scheduler.result_queue.popleft())
    scheduler.last_batch = None
    scheduler.running_batch.filter_batch()


HOOK = Hook(
    target="sglang.srt.managers.scheduler.Scheduler.process_input_requests",
    kind="before",
    function=wait_until_idle,
    parameters=("self", "recv_reqs"),
    why="SGLang asserts that it is idle when weights are updated or memory is released, and the server ends.",
    until="SGLang itself waits until it is idle.",
    test="tests/unit/test_waiting_for_idle.py::test_new_weights_wait_for_requests_that_just_finished",
)
