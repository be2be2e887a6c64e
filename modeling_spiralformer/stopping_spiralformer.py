# Copyright 2026 The SpiralFormer maintainers
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Stop strings in continuous batching, where the library ends a request by its tokens alone."""

import time
from collections.abc import Callable

import torch
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.tokenization_utils_base import PreTrainedTokenizerBase


class StoppingRouter(OutputRouter):
    """Delivers the outputs of requests, and ends a request once its text comes to one of its stop strings.

    It sees a request's output after every token: one with stop strings has to be added as streaming. The text is
    looked at as `generate()` does it, by the library's `StopStringCriteria`, prompt included.

    Args:
        cancel: called with the id of a request that ends here, before its last output goes out.
    """

    def __init__(self, cancel: Callable[[str], None]):
        super().__init__()
        self.cancel = cancel
        self.watched: dict[str, tuple[StopStringCriteria, bool]] = {}
        self.taken: set[str] = set()

    def take(
        self,
        request_ids: list[str],
        stop_strings: str | list[str] | None,
        tokenizer: PreTrainedTokenizerBase | None,
        streaming: bool,
    ) -> None:
        """Keeps ids for requests until they end, at one of these strings where there are any.

        The library would mix two requests of one id up, and end its loop.

        Args:
            streaming: whether, with stop strings, more than the last output goes out.

        Raises:
            `ValueError`: for an id that a request has, for stop strings without a tokenizer.
        """
        if taken := sorted(self.taken.intersection(request_ids)):
            raise ValueError(f"`request_id` must be one that no request has, but got {taken[0]!r}.")
        if stop_strings:
            if tokenizer is None:
                raise ValueError("`tokenizer` must be given with `stop_strings`, but got None.")
            criteria = StopStringCriteria(tokenizer, stop_strings)
            self.watched |= dict.fromkeys(request_ids, (criteria, streaming))
        self.taken.update(request_ids)

    def forget(self, request_ids: list[str]) -> None:
        """Looks at these requests no more; their ids are free."""
        for request_id in request_ids:
            self.watched.pop(request_id, None)
        self.taken.difference_update(request_ids)

    def drop(self, request_id: str) -> None:
        """Forgets a request that gets no more outputs, and who waits for them."""
        self.forget([request_id])
        self.result_handlers.pop(request_id, None)

    def deliver(self, output: GenerationOutput) -> None:
        """As the library does; such an output is an error, and the request's last."""
        self.forget([output.request_id])
        super().deliver(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """As the library does, of those that are to go out."""
        super().deliver_batch([output for output in outputs if self._goes_out(output)])

    def _goes_out(self, output: GenerationOutput) -> bool:
        criteria, streaming = self.watched.get(output.request_id, (None, True))
        if output.is_finished():
            self.forget([output.request_id])
        elif criteria is not None and ends(criteria, output):
            output.status, output.lifespan = RequestStatus.FINISHED, (output.lifespan[0], time.perf_counter())
            del self.watched[output.request_id]  # its id is free when the library has dropped it
            self.cancel(output.request_id)
        return streaming or output.is_finished()


def ends(criteria: StopStringCriteria, output: GenerationOutput) -> bool:
    """Whether the text of a request has come to one of its stop strings."""
    seen = criteria.maximum_token_len  # the criteria look at no more: a long text costs no more than a short one
    end = (output.prompt_ids[-seen:] + output.generated_tokens[-seen:])[-seen:]
    return bool(criteria(torch.tensor([end]), None))


__all__ = ["StoppingRouter"]
