"""The HTTP process can ask the schedulers to change their configuration and what they know, and waits for all."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook

ONE = 1
"""Schedulers that answer: several, with data parallelism, are refused at start."""


def add_communicators(result, self, *_):
    from sglang.srt.managers.communicator import FanOutCommunicator
    from sglang.utils import TypeBasedDispatcher

    from sglang_lsa.patches.config_messages import LSAConfigReqOutput
    from sglang_lsa.patches.status_messages import LSAStatusReqOutput

    for name, answer in (("lsa_config", LSAConfigReqOutput), ("lsa_status", LSAStatusReqOutput)):
        communicator = FanOutCommunicator(self._dispatch_to_scheduler, ONE)  # one request at a time
        setattr(self, f"{name}_communicator", communicator)
        self._result_dispatcher += TypeBasedDispatcher([(answer, communicator.handle_recv)])


HOOK = Hook(
    target="sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.init_communicators",
    kind="after",
    function=add_communicators,
    parameters=("self",),
    why="What schedulers answer must find its way to the HTTP request that asked.",
    until="SGLang lets plugins add control messages.",
    test="tests/server/test_control.py::test_a_change_is_answered_with_what_is_in_force",
    relies_on=(
        "sglang.srt.managers.communicator.FanOutCommunicator",
        "sglang.utils.TypeBasedDispatcher",
    ),
)
