"""What the library's server leaves out: a look at the weights, and the settings of each request of many at once.

It starts its manager with the settings of the first request, and gives later ones nothing but a count of new tokens.
"""

import copy
import dataclasses
import uuid
from typing import Any

from transformers import GenerationConfig
from transformers.cli.serving.utils import CBGenerateManager

from modeling_spiralformer import SpiralFormerForCausalLM
from modeling_spiralformer.continuous_spiralformer import check_decoding, check_length, default_batching
from workshop.checkpoints import check_loaded

# A manager has the processors that its settings name, whatever their values: a request brings its own.
SAMPLING = {"do_sample": True, "temperature": 0.5, "top_k": 1, "top_p": 0.5, "stop_strings": None}
GREEDY = {"temperature": 1.0, "top_k": 1, "top_p": 0.0}  # the last leaves one of those that are equally likely
# What a request brings besides, and what says nothing of its tokens.
BROUGHT = {*SAMPLING, "max_new_tokens", "max_length", "eos_token_id", "use_cache"}
SILENT = {"bos_token_id", "pad_token_id", "transformers_version", "_from_model_config"}


class ServedModel(SpiralFormerForCausalLM):
    """The model as the server loads it: refused where the checkpoint has other weights than its configuration."""

    @classmethod
    def from_pretrained(cls, name_or_path, *args, **options):
        model, info = SpiralFormerForCausalLM.from_pretrained(name_or_path, *args, **options, output_loading_info=True)
        check_loaded(name_or_path, model, info)
        return model


def request_settings(generation: GenerationConfig, vocabulary: int) -> dict[str, Any]:
    """What `add_request` takes of the settings of a request."""
    sampled = {
        "temperature": 1.0 if generation.temperature is None else float(generation.temperature),
        "top_k": generation.top_k or vocabulary,
        "top_p": 1.0 if generation.top_p is None else float(generation.top_p),
    }
    return {**(sampled if generation.do_sample else GREEDY), "stop_strings": generation.stop_strings}


def check_shared(shared: GenerationConfig, generation: GenerationConfig) -> None:
    """Raises ValueError for a setting of one request that its manager would follow in all requests, or in none."""
    usual = GenerationConfig._get_default_generation_params()
    for name, value in generation.to_dict().items():
        if value is None or name in BROUGHT | SILENT:
            continue
        of_all = getattr(shared, name, None)
        of_all = usual.get(name) if of_all is None else of_all
        if value != of_all:
            raise ValueError(
                f"`{name}` must be {of_all!r}, as for all requests that are batched, but got {value!r}: a request has "
                f"its own {', '.join(sorted(BROUGHT - {'use_cache', 'max_length'}))}."
            )


def check_followed(model: Any, generation: GenerationConfig, tokenizer: Any) -> None:
    """Answers 422 to settings that continuous batching does not follow."""
    from fastapi import HTTPException  # the server's own: `transformers[serving]`

    try:
        check_decoding(model, generation, tokenizer)
        check_length(generation, None)
        check_shared(model.generation_config, generation)
    except ValueError as error:
        raise HTTPException(status_code=422, detail=str(error)) from error


def one_of_its_own(request_id: str) -> str:
    """An id that no other request has: a client that asks again sends the same one."""
    return f"{request_id}-{uuid.uuid4().hex}"


class RequestManager:
    """A manager of continuous batching for one request, whose settings it adds."""

    def __init__(self, manager: Any, settings: dict[str, Any]):
        self.manager, self.settings = manager, settings

    def __getattr__(self, name: str) -> Any:
        return getattr(self.manager, name)

    def add_request(self, *args, **kwargs) -> str | None:
        """As the manager's, with the settings."""
        return self.manager.add_request(*args, **kwargs, **self.settings)


class RequestBatching(CBGenerateManager):
    """As the library's, with sampling settings and stop strings of each request.

    Raises:
        `HTTPException`: 422 for settings that continuous batching does not follow.
    """

    def init_cb(self, model, gen_config) -> None:
        """Starts the manager at the first request, with the model's settings: those of a request are its own."""
        shared = copy.deepcopy(model.generation_config)
        shared.update(**SAMPLING, max_length=None)
        check_followed(model, shared, None)
        batching = self._cb_config or default_batching(model.config)
        self._cb_config = dataclasses.replace(batching, per_request_processors=True)
        super().init_cb(model, shared)

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, *args, **kwargs):
        """As the library's, with the request's settings."""
        bound, name = self._of_request(model, processor, gen_config), one_of_its_own(request_id)
        return CBGenerateManager.generate_streaming(bound, model, processor, inputs, gen_config, name, *args, **kwargs)

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id, *args, **kwargs):
        """As the library's, with the request's settings."""
        bound, name = self._of_request(model, processor, gen_config), one_of_its_own(request_id)
        return await CBGenerateManager.generate_non_streaming(
            bound, model, processor, inputs, gen_config, name, *args, **kwargs
        )

    def _of_request(self, model, processor, gen_config) -> "RequestBatching":
        check_followed(model, gen_config, processor)
        bound, manager = copy.copy(self), self._cb
        manager.tokenizer = processor  # one model, one tokenizer
        bound._cb = RequestManager(manager, request_settings(gen_config, model.config.vocab_size))
        return bound
