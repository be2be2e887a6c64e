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
"""A decode step over a static cache in parts, each compiled by itself; Python runs those that the step needs.

Compiled whole, a step has one graph for every set of levels that fill together, and every graph has all layers of
prelude, coda and of the levels in it. In parts each layer is compiled for one of its places:

    enter       embeddings, f_pre, InitTopology, and the token into the first level
    core        f_loop: one graph for all iterations, whatever the number of latents that a level has room for
    link        between two cores: the update of one iteration, Topology, and the token into the next level
    leave       the update of the last iteration, Topology, f_post, norm and head

A link has few and small kernels, and every one is another: on a CPU, where compiling one takes as long as a part of
layers, it runs as it stands. In a step that fills no chunk of a level Python leaves out the core alone: what is stored
then is what was there.

Shape letters: B batch, D hidden size; a step has one token, and one latent of each level that fills.
"""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any
from weakref import ref

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticCache, StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from .adapters_spiralformer import meet_adapters
from .batch_spiralformer import Columns, MaybeNone, Past, check_mask_shape, read_batch
from .cache_name_spiralformer import CACHE_NAME, takes_either_cache_name
from .cache_spiralformer import check_states, find_states
from .chunking_spiralformer import FilledChunks
from .elastic_spiralformer import check_shared
from .static_cache_spiralformer import StaticState, check_room

Begun = tuple[Any, StaticState]  # an iteration
Ended = tuple[Any, StaticState, torch.Tensor | None, FilledChunks | None]  # and its latents, if there are any


class EntryCache:
    """One entry of a cache as its layer sees it.

    Args:
        filled: the latent that the call fills; None of an entry of tokens.
    """

    is_compileable = True

    def __init__(self, entry: Any, filled: FilledChunks | MaybeNone = None):
        self.entry, self.filled = entry, filled

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """As `Cache.update`, into this entry. A graph that looked at the layer's number would be of one layer."""
        return self.entry.update(key_states, value_states, self.filled)

    def get_query_offset(self, layer_idx: int) -> Columns:
        """The latent column that runs."""
        return self.filled.first

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many latent columns the keys span, and the first of them."""
        return self.entry.keys.shape[-2], 0


# -- the parts ------------------------------------------------------------------------------------------------------


def enter(
    body: Any,
    cache: Cache,
    past: Past,
    inputs: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    entries: Sequence[StaticLayer],
    begun: Begun,
) -> tuple[dict, torch.Tensor, Any, torch.Tensor, FilledChunks]:
    """What the token layers are given, h_0, the carrier, and the latent of the first iteration.

    Args:
        inputs: `input_ids`, `inputs_embeds` and `position_ids`.
        entries: those of the prelude.
    """
    input_ids, inputs_embeds, position_ids = inputs
    embeddings = body._embed(input_ids, inputs_embeds)
    batch = read_batch(None, position_ids, {}, embeddings, past)
    given = body._token_arguments(batch, cache, embeddings)
    del given[body.cache_argument]
    hidden_states = run_layers(body.prelude, entries, body.cache_argument, embeddings, given)
    hidden_states, carrier = body.topology(hidden_states, embeddings)
    return given, hidden_states, carrier, *begin(begun, hidden_states)


def core(
    body: Any, layers: Sequence[nn.Module], entries: Sequence[Any], latents: torch.Tensor, filled: FilledChunks
) -> torch.Tensor:
    """f_loop on a latent `(B, 1, D)`. Nothing in it tells levels apart but the number of latents in the entries."""
    valid = filled.valid
    if valid is not None:  # the first and the last latent column of each row
        columns = torch.arange(entries[0].keys.shape[-2], device=latents.device)
        valid = (columns >= valid[:, :1]) & (columns <= valid[:, 1:])
    given = {
        "attention_mask": create_causal_mask(
            config=body.layer_config,
            inputs_embeds=latents,
            attention_mask=valid,
            **{CACHE_NAME: EntryCache(entries[0], filled)},
            layer_idx=0,
        ),
        "position_ids": filled.position_ids,
        "position_embeddings": body.rotary_emb(latents, position_ids=filled.position_ids),
    }
    for layer, entry in zip(layers, entries, strict=True):
        latents = layer(latents, **{body.cache_argument: EntryCache(entry, filled)}, **given)
    return latents


def link(
    topology: nn.Module, hidden_states: torch.Tensor, carrier: Any, ended: Ended, begun: Begun, fills: bool
) -> tuple[torch.Tensor, Any, torch.Tensor | None, FilledChunks | None]:
    """h_(t+1), the carrier, and the latent of the iteration that begins, from h_t and the one that ends.

    Args:
        fills: whether the token fills one; True in a graph, which computes it in every step.
    """
    hidden_states, carrier = topology(end(ended), hidden_states, carrier)
    if not fills:
        begun[1].write_token(hidden_states)
        return hidden_states, carrier, None, None
    return hidden_states, carrier, *begin(begun, hidden_states)


def leave(
    model: Any, hidden_states: torch.Tensor, carrier: Any, ended: Ended, entries: Sequence[StaticLayer], given: dict
) -> torch.Tensor:
    """The logits. `entries` are those of the coda."""
    body = model.model
    hidden_states, _ = body.topology(end(ended), hidden_states, carrier)
    hidden_states = run_layers(body.coda, entries, body.cache_argument, hidden_states, given)
    return model.lm_head(body.norm(hidden_states))


def begin(begun: Begun, hidden_states: torch.Tensor) -> tuple[torch.Tensor, FilledChunks]:
    """The latent that the token fills, if it fills any, and which one it is."""
    resolution, state = begun
    state.write_token(hidden_states)
    filled = state.filled_by_token()
    return resolution.scale_down(state.members(filled), filled.present), filled


def end(ended: Ended) -> torch.Tensor:
    """The update `(B, 1, D)` of the token."""
    resolution, state, latents, filled = ended
    if latents is not None and filled is not None:
        state.store(latents, filled)
    update = state.shift(resolution.scale_up(state.readable(1)), 1)
    state.trim(1)
    return update


def run_layers(
    layers: Sequence[nn.Module], entries: Sequence[StaticLayer], name: str, hidden_states: torch.Tensor, given: dict
) -> torch.Tensor:
    """Layers over tokens."""
    for layer, entry in zip(layers, entries, strict=True):
        hidden_states = run_layer(layer, entry, name, hidden_states, given)
    return hidden_states


@torch.compiler.nested_compile_region
def run_layer(layer: nn.Module, entry: StaticLayer, name: str, hidden_states: torch.Tensor, given: dict):
    """One of them: translated once for all of a part."""
    return layer(hidden_states, **{name: EntryCache(entry)}, **given)


# -- the step -------------------------------------------------------------------------------------------------------


class CompiledStep:
    """`model(...)` for `generate()`: steps of one token over a static cache in parts, any other call compiled whole.

    Args:
        model: a `SpiralFormerForCausalLM`.
        whole: its compiled call.
        options: of `torch.compile`.
    """

    def __init__(self, model: Any, whole: Callable, options: dict[str, Any]):
        self.model, self.whole, self.options = model, whole, options
        self.parts: dict[str, Callable] = {}
        self.cache: ref | None = None  # that of the last step
        self.hooks: list[dict] = []  # of all modules, when its steps began, and their variables
        self.variables: list[dict[str, Any]] = []

    @takes_either_cache_name("cache")
    def __call__(self, **inputs) -> CausalLMOutputWithPast:
        """As `model(...)`."""
        states = self._states_of_step(**inputs)
        if states is None:
            return self.whole(**{CACHE_NAME if name == "cache" else name: value for name, value in inputs.items()})
        cache, rows = inputs["cache"], states[0].rows
        past = Past(states[0].column, rows, settled=True, room=cache.layers[-1].get_max_length(), is_given=True)
        given = tuple(inputs.get(name) for name in ("input_ids", "inputs_embeds", "position_ids"))
        torch.compiler.cudagraph_mark_step_begin()
        rows.unfinished = True
        logits = self._run(cache, states, past, given)
        rows.end()
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: cache})

    def _run(self, cache: Any, states: list[StaticState], past: Past, inputs: tuple) -> torch.Tensor:
        """The parts of one step in turn."""
        body, layers = self.model.model, cache.layers
        core_layers = [*body.core]
        runs = [state.take_turn(1) for state in states]
        iterations = list(zip(body.resolutions, states, strict=True))
        enter_part, core_part, leave_part = (self._part(function) for function in (enter, core, leave))
        given, hidden_states, carrier, latents, filled = enter_part(
            body, cache, past, inputs, layers[: len(body.prelude)], iterations[0]
        )
        for t, entries in enumerate(body.core_entries):
            if runs[t]:
                own = [core_layers[index] for index in body.core_layers[t]]
                latents = core_part(body, own, layers[entries.start : entries.stop], latents, filled)
            ended = (*iterations[t], latents, filled)
            if t + 1 == len(iterations):
                break
            # Graphs always get latents: the links where they are compiled, and the end.
            fills = self._compiles_links or runs[t + 1] or t + 2 == len(iterations)
            link_part = self._part(link, t) if self._compiles_links else link
            hidden_states, carrier, latents, filled = link_part(
                body.topology, hidden_states, carrier, ended, iterations[t + 1], fills
            )
        return leave_part(self.model, hidden_states, carrier, ended, layers[len(layers) - len(body.coda) :], given)

    @property
    def _compiles_links(self) -> bool:
        """Not on a CPU: there a small kernel costs a call, and to compile it seconds."""
        return self.model.device.type != "cpu"

    def _part(self, function: Callable, iteration: int | None = None) -> Callable:
        """A compiled part, with code of its own: torch counts graphs, and compares what they are for, by code."""
        name = function.__name__ if iteration is None else f"{function.__name__}_{iteration}"
        if name not in self.parts:
            own = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
            self.parts[name] = torch.compile(own, **self.options)
        return self.parts[name]

    def _states_of_step(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = True,
        **others: Any,
    ) -> list[StaticState] | None:
        """The states of a step that can run in parts; None for any other call. Refuses what the model refuses."""
        body = self.model.model
        new: torch.Tensor | MaybeNone = inputs_embeds if input_ids is None else input_ids
        is_token = new is not None and new.shape[1] == 1 and (input_ids is None or inputs_embeds is None)
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep in (0, 1)
        if not is_token or not keeps_all or return_dict is False or use_cache is False or any_given(others):
            return None
        if not body.grids or not isinstance(cache, StaticCache):
            return None
        if is_new := self.cache is None or self.cache() is not cache:
            modules = [*self.model.modules()]
            self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
            self.variables = [vars(m) for m in modules]
        if self._is_watched():
            return None
        states: list[Any] = [getattr(cache.layers[entries.start], "state", None) for entries in body.core_entries]
        if not all(state is not None and state.begun and state.settled for state in states):
            return None
        rows = states[0].rows
        if meet_adapters(body) or rows.every_row or rows.row_ends is not None:
            return None
        if body.shared:
            check_shared(body)
        if is_new:  # to look at all its layers takes 1% of a step
            find_states(cache, body.config, body.grids, new)
            self.cache = ref(cache)
        else:
            check_states(states, body.grids, new.shape[0])
            check_room(states, 1)
        if attention_mask is not None:
            room = cache.layers[-1].get_max_length()
            check_mask_shape(attention_mask, new, Past(states[0].seen, rows, settled=True, room=room, is_given=True))
        return states

    def _is_watched(self) -> bool:
        """Whether more happens in a call than its parts know of: gradients, dropout, hooks, recorded states."""
        model, body = self.model, self.model.model
        config = body.config
        if torch.is_grad_enabled() or body.emb_dropout.training or hasattr(model, "_hf_hook"):
            return True
        if config.output_hidden_states or config.output_attentions:
            return True
        return any(self.hooks) or any("forward" in variables for variables in self.variables)


def any_given(options: dict[str, Any]) -> bool:
    """Whether any option is more than a no."""
    return any(value is not None and value is not False for value in options.values())


__all__ = ["CompiledStep"]
