"""GPT-NeoX (Pythia) models as SpiralFormer models of a chosen layer split, and plain stacks back again.

The layers of both are one class of the library, so a converted layer is a copy. What SpiralFormer adds has no
counterpart in the source: scorers and allocators start as in any new model, the routers of MeSH by `start_routers`.
"""

import copy
import dataclasses

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM
from modeling_spiralformer.configuration_spiralformer import refuse
from modeling_spiralformer.modeling_spiralformer import SpiralFormerMeSH
from workshop.checkpoints import has_tokenizer, load_config, load_model, load_tokenizer

# How firmly the routers of a converted model start at one slot: its share is e^b / (e^b + N - 1) of N slots.
ROUTER_BIAS = 6.0
# Beyond this a share differs from 0 and 1 by less than any dtype holds, and the router could not learn.
ROUTER_BIAS_RANGE = (0.0, 100.0)


def own_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """The fields that a configuration class declares itself, without those of every configuration."""
    common = {item.name for item in dataclasses.fields(PreTrainedConfig)}
    return {item.name for item in dataclasses.fields(config_class)} - common


SHARED_FIELDS = own_fields(GPTNeoXConfig) & own_fields(SpiralFormerConfig)
LOOP_FIELDS = own_fields(SpiralFormerConfig) - SHARED_FIELDS
# What a configuration says of its own class and file, and GPT-NeoX's layer count, which the split replaces.
NOT_CARRIED = {"model_type", "architectures", "transformers_version", "_name_or_path", "num_hidden_layers", "auto_map"}


# -- configurations ---------------------------------------------------------------------------------------------


def carried_fields(config: PreTrainedConfig) -> dict[str, object]:
    """Everything of a configuration that the other architecture takes as it is, unknown fields included.

    Raises ValueError for a quantised checkpoint: its weights are not the layers' own.
    """
    if getattr(config, "quantization_config", None) is not None:
        refuse("quantization_config", config.quantization_config, "absent: convert first, then quantise")
    values = {name: value for name, value in config.to_dict().items() if name not in NOT_CARRIED}
    # GPT-NeoX never reads `is_decoder`: the default is not worth a line in every converted config.json.
    return {name: value for name, value in values.items() if name != "is_decoder" or value}


def spiral_config(source: GPTNeoXConfig, **options) -> SpiralFormerConfig:
    """
    The configuration of a converted model.

    Args:
        source: configuration of the GPT-NeoX model; all of its fields are carried over.
        options: fields of the loop, such as `num_prelude_layers`, `chunk_sizes` or `topology`; the others keep
            SpiralFormer's defaults. With `chunk_sizes=[]` and no layer counts, all layers are the prelude.

    Raises:
        ValueError: for a field that comes from the source, for a split that the source's layers do not fit, and for a
            setting of the source that SpiralFormer does not have (such as dynamic rotary angles).
    """
    for name, value in options.items():
        if name not in LOOP_FIELDS - {"scale_embeddings"}:
            allowed = f"left to the source checkpoint: a conversion sets only {sorted(LOOP_FIELDS)}"
            refuse(name, value, allowed.replace("'scale_embeddings', ", ""))
    carried = carried_fields(source)
    for name in sorted(LOOP_FIELDS & carried.keys()):
        refuse(name, carried[name], "absent from a GPT-NeoX configuration")
    layers = source.num_hidden_layers
    if options.get("chunk_sizes", True) in ([], ()):
        coda = options.setdefault("num_coda_layers", 0)
        options = {"num_prelude_layers": layers - coda, "num_core_layers": 0, **options}
    config = SpiralFormerConfig(**carried, scale_embeddings=False, **options)
    outer = config.num_prelude_layers + config.num_coda_layers
    if outer > layers or (not config.chunk_sizes and outer != layers):
        allowed = f"at most the source's {layers} layers together" if config.chunk_sizes else f"{layers} together"
        refuse("num_prelude_layers, num_coda_layers", (config.num_prelude_layers, config.num_coda_layers), allowed)
    return config


def gpt_neox_config(config: SpiralFormerConfig) -> GPTNeoXConfig:
    """
    The configuration of a plain stack as GPT-NeoX.

    Raises ValueError where the model has a loop, or scales its embeddings: GPT-NeoX has neither.
    """
    if config.chunk_sizes:
        refuse("chunk_sizes", config.chunk_sizes, "[]: GPT-NeoX has no loop")
    if config.scale_embeddings:
        refuse("scale_embeddings", config.scale_embeddings, "False: GPT-NeoX does not scale its embeddings")
    carried = {name: value for name, value in carried_fields(config).items() if name not in LOOP_FIELDS}
    return GPTNeoXConfig(**carried, num_hidden_layers=config.num_hidden_layers)


# -- weights ----------------------------------------------------------------------------------------------------


def parse_core_layers(texts: list[str]) -> list[list[int]]:
    """Reads `["4", "5+6"]`: one core layer each, a copy of source layer 4 and the mean of 5 and 6."""
    groups = []
    for text in texts:
        parts = text.split("+")
        if not all(part.isdecimal() for part in parts):
            refuse("core_layers", text, 'a source layer such as "4", or several such as "4+5" for their mean')
        groups.append([int(part) for part in parts])
    return groups


def core_size(config: SpiralFormerConfig) -> int:
    """How many layers the core has, those of all iterations where they are not shared."""
    return config.num_core_layers * (1 if config.share_core else config.num_iterations)


def default_core_layers(config: SpiralFormerConfig, source_layers: int) -> list[list[int]]:
    """
    Copies spread evenly over the source layers between prelude and coda, from the first of them on.

    Raises ValueError where the core has more layers than lie between.
    """
    count = core_size(config)
    first, between = config.num_prelude_layers, source_layers - config.num_prelude_layers - config.num_coda_layers
    if count > between:
        allowed = f"at most the {between} layers between prelude and coda, or `core_layers` must name {count} of them"
        refuse("num_core_layers", config.num_core_layers, allowed)
    return [[first + index * between // count] for index in range(count)]


def check_core_layers(groups: list[list[int]], config: SpiralFormerConfig, source_layers: int) -> list[list[int]]:
    """Refuses groups of source layers that do not fit the core, or name a layer that is not there."""
    count = core_size(config)
    if len(groups) != count:
        refuse("core_layers", groups, f"{count} entries, one for each layer of the core")
    for group in groups:
        if not group or any(type(index) is not int or not 0 <= index < source_layers for index in group):
            refuse("core_layers", group, f"source layers in [0, {source_layers - 1}]")
    return groups


def copy_layer(sources: list[nn.Module], target: nn.Module) -> None:
    """Gives a layer the mean of the sources' parameters, taken in float64 and rounded once; of one source a copy."""
    states = [layer.state_dict() for layer in sources]
    if len(states) > 1:
        means = {name: torch.stack([state[name].double() for state in states]).mean(dim=0) for name in states[0]}
        states = [means]
    target.load_state_dict(states[0])


def parts_outside_of_layers(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Embeddings, final norm and head of either architecture."""
    norm = model.gpt_neox.final_layer_norm if isinstance(model, GPTNeoXForCausalLM) else model.model.norm
    return model.get_input_embeddings(), norm, model.get_output_embeddings()


def copy_outside_of_layers(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copies what is no layer, and the settings of `generate()`."""
    for copied, part in zip(parts_outside_of_layers(source), parts_outside_of_layers(target), strict=True):
        part.load_state_dict(copied.state_dict())
    target.generation_config = copy.deepcopy(source.generation_config)


def start_routers(topology: SpiralFormerMeSH, config: SpiralFormerConfig, bias: float) -> None:
    """
    Starts the routers of MeSH so that the loop is nearly the plain stack of the layers that were copied into it.

    Cycle k writes to slot k + 1 (the last slot where there are fewer). It reads the newest state at token resolution:
    v, and after an iteration with g = 1 that iteration's update. A coarse update starts with the small share that the
    softmax leaves it, and grows from there. The weights start at 0, because the states of a trained model can be large
    enough to outweigh any bias; noise on the biases keeps the other slots from staying equal.

    Args:
        topology: the routers, changed in place.
        config: the model's configuration.
        bias: how far the logit of the chosen slot exceeds the others.
    """
    last_slot = config.resolved_num_memory_slots - 1
    slot_read = min(1, last_slot)
    for cycle, (write, read) in enumerate(zip(topology.write, topology.read, strict=True)):
        slot_written = min(cycle + 1, last_slot)
        if cycle > 0 and config.chunk_sizes[cycle - 1] == 1:
            slot_read = slot_written
        for router, slot in ((write, slot_written), (read, slot_read)):
            nn.init.zeros_(router.weight)
            nn.init.normal_(router.bias, mean=0.0, std=config.initializer_range)
            router.bias[slot] += bias


# -- models -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def to_spiralformer(
    source: GPTNeoXForCausalLM,
    core_layers: list[list[int]] | None = None,
    router_bias: float = ROUTER_BIAS,
    **options,
) -> SpiralFormerForCausalLM:
    """
    A SpiralFormer in the dtype of a GPT-NeoX model, and with its weights.

    The prelude copies the source's first layers, the coda its last ones.

    Args:
        source: the GPT-NeoX model; it stays as it is.
        core_layers: for each layer of the core, the source layers whose mean it gets. Default: `default_core_layers`.
            With `share_core=False` these are the layers of all iterations, one iteration after the other.
        router_bias: see `start_routers`; used with the topology "mesh" alone.
        options: fields of the loop, see `spiral_config`.

    Raises:
        ValueError: naming what does not fit, in the source's configuration, the split or the core.
    """
    config = spiral_config(source.config, **options)
    low, high = ROUTER_BIAS_RANGE
    if not low <= router_bias <= high:
        refuse("router_bias", router_bias, f"a number in [{low:g}, {high:g}]")
    layers = source.gpt_neox.layers
    groups = default_core_layers(config, len(layers)) if core_layers is None else core_layers
    check_core_layers(groups, config, len(layers))
    target = AutoModelForCausalLM.from_config(config, dtype=source.dtype)
    copy_outside_of_layers(source, target)
    prelude = [[i] for i in range(config.num_prelude_layers)]
    coda = [[i] for i in range(len(layers) - config.num_coda_layers, len(layers))]
    copies = ((target.model.prelude, prelude), (target.model.core, groups), (target.model.coda, coda))
    for stack, stack_groups in copies:
        for layer, group in zip(stack, stack_groups, strict=True):
            copy_layer([layers[index] for index in group], layer)
    if isinstance(target.model.topology, SpiralFormerMeSH):
        start_routers(target.model.topology, config, router_bias)
    return target


@torch.no_grad()
def to_gpt_neox(source: SpiralFormerForCausalLM) -> GPTNeoXForCausalLM:
    """
    A plain stack (`chunk_sizes=[]`) as a GPT-NeoX model of the same dtype, tensors and logits.

    Raises:
        ValueError: where the model has a loop, or scales its embeddings.
    """
    target = AutoModelForCausalLM.from_config(gpt_neox_config(source.config), dtype=source.dtype)
    copy_outside_of_layers(source, target)
    for layer, copied in zip(target.gpt_neox.layers, (*source.model.prelude, *source.model.coda), strict=True):
        copy_layer([copied], layer)
    return target


# -- the source ----------------------------------------------------------------------------------------------------


def load_source(name_or_path: str, model_type: str) -> PreTrainedModel:
    """A checkpoint with all of its weights, in its own dtype; refused where it is another architecture."""
    config = load_config(name_or_path)
    if config.model_type != model_type:
        refuse(
            "model_name_or_path", name_or_path, f'a checkpoint of model_type "{model_type}", not "{config.model_type}"'
        )
    return load_model(name_or_path, config, dtype="auto")


def source_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the source, carried as it is; None where the source has none."""
    return load_tokenizer(name_or_path, None, "model_name_or_path") if has_tokenizer(name_or_path) else None
