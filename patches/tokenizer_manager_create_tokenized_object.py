"""What SGLang builds of the sampling parameters raises what it likes, and is not what its messages can carry."""

from __future__ import annotations

from sglang_lsa.patches.hook import Hook
from sglang_lsa.serve.screen.request import refusing


def create(original, self, obj, *rest, **named):
    if getattr(self.server_args, "lsa_config", None) is None:
        return original(self, obj, *rest, **named)
    with refusing("sampling_params"):
        made = original(self, obj, *rest, **named)
    carried(made)
    return made


def carried(made) -> None:
    """Raise ValueError unless the scheduler will be able to read ``made``."""
    from sglang.srt.managers import io_struct

    if io_struct._USE_PICKLE_IPC:
        return
    import msgspec

    parameters = made.sampling_params
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(parameters), type=type(parameters))
    except (msgspec.ValidationError, OverflowError, TypeError) as error:
        raise ValueError(f"sampling_params cannot be passed on: {error}: use flat lists and objects") from None


HOOK = Hook(
    target="sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
    kind="around",
    function=create,
    parameters=("self", "obj"),
    why="With SGLANG_USE_PICKLE_IPC=0 the scheduler ends with a message whose types are others than declared.",
    until="SGLang checks what it sends.",
    test="tests/server/test_screen.py::test_typed_messages",
    relies_on=("sglang.srt.managers.io_struct._USE_PICKLE_IPC",),
)
