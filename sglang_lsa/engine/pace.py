"""Pace: how many tokens of prompts are computed for each decode step, where prompts are many and nobody shall wait."""

from __future__ import annotations

from collections.abc import Callable

from sglang_lsa.engine.choose import Rules


class Pace:
    """SGLang computes prompts as long as there are any, and decodes then. Where the KV pool lets few contexts in, that
    is soon; with LSA many get in, so that under a load of new documents those that decode would stand still.

    With a bound (``prefill_tokens_per_step``) passes over so many tokens are followed by as many decode steps as they
    have bounds' worth of them, for those that decode: after whole prompts, so that who decodes is seldom interrupted,
    and after a part of one as soon as that has ``prefill_burst_tokens``, so that no interruption is much longer than
    those take. A pass that ends one prompt and begins the next ends one. Passes are counted and not timed: all ranks
    agree.

    Args:
        rules: with the configuration in force.
    """

    def __init__(self, rules: Rules):
        self.rules = rules
        self.waits = 0
        """Scheduling passes in which prompts waited for decode steps."""
        self._owed = 0
        self._part = False
        """The last pass computed a part of one prompt, and nothing else."""
        self._paying = False
        """Steps that were due are being done."""

    def prompts_wait(
        self,
        decoding: int,
        prompts: bool = True,
        step_fits: Callable[[], bool] = lambda: True,
        chunked: bool = True,
    ) -> bool:
        """Whether prompts are not computed in this scheduling pass, which is a decode step then.

        Args:
            decoding: requests that decode in it unless prompts are computed.
            prompts: whether there are any.
            step_fits: whether there is memory for that decode step beside what a prompt that is half computed was
                promised; asked only if the step is due.
            chunked: whether a prompt is half computed.
        """
        bound, burst = self.rules.config.prefill_tokens_per_step, self.rules.config.prefill_burst_tokens
        if not bound or not decoding:
            self._owed = 0
            return False
        if prompts and chunked and self._part and not self._paying and self._owed < burst:
            return False
        self._paying = self._owed >= bound
        if not self._paying:
            # Passes over a few tokens are worth a step together; without prompts this is one.
            self._owed = self._owed % bound if prompts else 0
            return False
        if prompts and not step_fits():
            self._owed = min(self._owed, max(bound, burst))  # nobody is to wait for all that was refused for long
            return False
        self._owed -= bound
        self.waits += prompts
        return prompts

    def computed(self, tokens: int, part: bool = False) -> None:
        """A pass computes so many tokens of prompts.

        Args:
            part: they are of one prompt, which has more.
        """
        self._owed += tokens
        self._part, self._paying = part, False
