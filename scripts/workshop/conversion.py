"""Models of the library as SpiralFormer models of a chosen layer split, and plain stacks back again.

The layers of both are one class of the library, so a converted layer is a copy. `FAMILIES` has the models whose layers
these are. What SpiralFormer adds has no counterpart in the source: scorers and allocators start as in any new model,
the routers of MeSH by `start_routers`, the gates of streams by `start_gates`.
"""

import copy
import dataclasses
import math
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM
from modeling_spiralformer.configuration_spiralformer import refuse
from modeling_spiralformer.layers_spiralformer import FAMILIES, LayerFamily
from modeling_spiralformer.topology_spiralformer import SpiralFormerHyperConnections, SpiralFormerMeSH, logit
from workshop.checkpoints import check_loaded, common_dtype, has_tokenizer, load_config, load_model, load_tokenizer

# How firmly the routers of a converted model start at one slot: its share is e^b / (e^b + N - 1) of N slots.
ROUTER_BIAS = 6.0
# Beyond this a share differs from 0 and 1 by less than any dtype holds, and the router could not learn.
ROUTER_BIAS_RANGE = (0.0, 100.0)
# What a gate that a converted model starts as closed lets through: what that bias leaves the other of two slots.
CLOSED_GATE = 1 / (1 + math.exp(ROUTER_BIAS))
# `model_type` of a source -> `layer_family` of what it becomes.
FAMILY_OF = {family.config_class.model_type: name for name, family in FAMILIES.items()}


def own_fields(config_class: type[PreTrainedConfig]) -> dict[str, None]:
    """The fields that a configuration class declares itself, in order, without those of every configuration."""
    common = {item.name for item in dataclasses.fields(PreTrainedConfig)}
    return dict.fromkeys(item.name for item in dataclasses.fields(config_class) if item.name not in common)


SOURCE_FIELDS = {name for family in FAMILIES.values() for name in own_fields(family.config_class)}
# What a source leaves open, and what it says by being what it is.
LOOP_FIELDS = own_fields(SpiralFormerConfig).keys() - SOURCE_FIELDS - {"layer_family", "norm", "scale_embeddings"}
IMPLIED_FIELDS = {"layer_family", "norm", "scale_embeddings"}
# What a configuration says of its own class and file, and a plain stack's layer count, which the split replaces.
NOT_CARRIED = {"model_type", "architectures", "transformers_version", "_name_or_path", "num_hidden_layers", "auto_map"}


# -- configurations ---------------------------------------------------------------------------------------------


def source_family(config: PreTrainedConfig) -> LayerFamily:
    """The family of a source's layers. Raises ValueError where there is none."""
    if config.model_type not in FAMILY_OF:
        refuse("model_type", config.model_type, f"one of {[*FAMILY_OF]}, whose layers are known")
    return FAMILIES[FAMILY_OF[config.model_type]]


def saved_fields(config: PreTrainedConfig) -> dict[str, object]:
    """What a configuration says of the model, unknown fields included.

    Raises ValueError for a quantised checkpoint: its weights are not the layers' own.
    """
    if getattr(config, "quantization_config", None) is not None:
        refuse("quantization_config", config.quantization_config, "absent: convert first, then quantise")
    return {name: value for name, value in config.to_dict().items() if name not in NOT_CARRIED}


def carried_fields(source: PreTrainedConfig) -> dict[str, object]:
    """Everything of a source's configuration that SpiralFormer takes as it is.

    Raises ValueError for a setting that would change the layers, and that SpiralFormer does not have.
    """
    family, values = source_family(source), saved_fields(source)
    defaults = family.config_class(num_hidden_layers=source.num_hidden_layers)
    for name in own_fields(family.config_class):
        if name in own_fields(SpiralFormerConfig) or name in NOT_CARRIED:
            continue
        if name in family.unread_fields:
            # The default is not worth a line in every converted config.json.
            if values.get(name) == getattr(defaults, name):
                values.pop(name, None)
        elif values.pop(name, None) != getattr(defaults, name):
            allowed = f"{getattr(defaults, name)!r}: SpiralFormer has no other"
            refuse(name, getattr(source, name), allowed)
    for name in sorted((LOOP_FIELDS | IMPLIED_FIELDS) & values.keys()):
        refuse(name, values[name], f'absent from a configuration of model_type "{source.model_type}"')
    return values


def spiral_config(source: PreTrainedConfig, **options) -> SpiralFormerConfig:
    """
    The configuration of a converted model.

    Args:
        source: configuration of a model of one of `FAMILIES`; all of its fields are carried over.
        options: fields of the loop, such as `num_prelude_layers`, `chunk_sizes` or `topology`; the others keep
            SpiralFormer's defaults. With `chunk_sizes=[]` and no layer counts, all layers are the prelude.

    Raises:
        ValueError: for a field that comes from the source, for a split that the source's layers do not fit, and for a
            setting of the source that SpiralFormer does not have (such as dynamic rotary angles or a sliding window).
    """
    for name, value in options.items():
        if name not in LOOP_FIELDS:
            refuse(name, value, f"left to the source checkpoint: a conversion sets only {sorted(LOOP_FIELDS)}")
    carried = carried_fields(source)
    layers = source.num_hidden_layers
    if options.get("chunk_sizes", True) in ([], ()):
        coda = options.setdefault("num_coda_layers", 0)
        options = {"num_prelude_layers": layers - coda, "num_core_layers": 0, **options}
    family = FAMILY_OF[source.model_type]
    config = SpiralFormerConfig(**carried, layer_family=family, scale_embeddings=False, **options)
    outer = config.num_prelude_layers + config.num_coda_layers
    if outer > layers or (not config.chunk_sizes and outer != layers):
        allowed = f"at most the source's {layers} layers together" if config.chunk_sizes else f"{layers} together"
        refuse("num_prelude_layers, num_coda_layers", (config.num_prelude_layers, config.num_coda_layers), allowed)
    return config


def plain_config(config: SpiralFormerConfig) -> PreTrainedConfig:
    """
    The configuration of a plain stack as that of the library's own model of its family.

    Raises ValueError where the model has a loop, scales its embeddings, or has norms of another kind: none of those
    models has.
    """
    family = FAMILIES[config.layer_family]
    named = f'with layer_family "{config.layer_family}"'
    if config.chunk_sizes:
        refuse("chunk_sizes", config.chunk_sizes, "[]: a plain stack has no loop")
    if config.scale_embeddings:
        refuse("scale_embeddings", config.scale_embeddings, "False: a plain stack does not scale its embeddings")
    if config.norm != family.norm:
        refuse("norm", config.norm, f'"{family.norm}" {named}')
    lacking = own_fields(SpiralFormerConfig).keys() - own_fields(family.config_class).keys()
    defaults = SpiralFormerConfig(layer_family=config.layer_family).to_dict()
    carried = {
        name: value
        for name, value in saved_fields(config).items()
        if name not in LOOP_FIELDS | IMPLIED_FIELDS and (name not in lacking or value != defaults[name])
    }
    if family.partial_rotary_factor is None:  # the whole head, which that model need not be told
        carried["rope_parameters"] = {
            name: value for name, value in config.rope_parameters.items() if name != "partial_rotary_factor"
        }
    return family.config_class(**carried, num_hidden_layers=config.num_hidden_layers)


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


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a plain stack, in either architecture."""
    if isinstance(model, SpiralFormerForCausalLM):
        return [*model.model.prelude, *model.model.coda]
    return [*model.base_model.layers]


def parts_outside_of_layers(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """Embeddings, final norm and head of either architecture."""
    ours = isinstance(model, SpiralFormerForCausalLM)
    norm = "norm" if ours else source_family(model.config).final_norm
    return model.get_input_embeddings(), getattr(model.base_model, norm), model.get_output_embeddings()


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


def start_gates(topology: SpiralFormerHyperConnections, config: SpiralFormerConfig) -> None:
    """
    Starts the gates of streams so that the loop is nearly the plain stack of the layers that were copied into it.

    Every iteration reads the mean of the streams. One with g = 1 writes its update in their place. A coarse one keeps
    them, and its update starts with a small share. The weights of the gates that read start at 0, so that h_0 is v.
    Those of the others stay as drawn: they tell the streams apart, which would stay equal for ever.
    """
    for size, connection in zip(config.chunk_sizes, topology.connections, strict=True):
        written = 1 - CLOSED_GATE if size == 1 else CLOSED_GATE
        nn.init.zeros_(connection.read.projection.weight)
        nn.init.constant_(connection.read.bias, logit(1 / topology.num_streams))
        nn.init.constant_(connection.keep.bias, logit(1 - written))
        nn.init.constant_(connection.write.bias, logit(written / 2))


# -- models -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def to_spiralformer(
    source: PreTrainedModel,
    core_layers: list[list[int]] | None = None,
    router_bias: float | None = None,
    **options,
) -> SpiralFormerForCausalLM:
    """
    A SpiralFormer with the weights of a model of one of `FAMILIES`, in the dtype that takes all of them, and its mode.

    The prelude copies the source's first layers, the coda its last ones.

    Args:
        source: a causal language model, such as a `LlamaForCausalLM`; it stays as it is.
        core_layers: for each layer of the core, the source layers whose mean it gets. Default: `default_core_layers`.
            With `share_core=False` these are the layers of all iterations, one iteration after the other.
        router_bias: see `start_routers`. Default: `ROUTER_BIAS`; None with another topology than "mesh".
        options: fields of the loop, see `spiral_config`.

    Raises:
        ValueError: naming what does not fit, in the source's configuration, the split or the core.
    """
    for name in ("router_start", "gate_start"):
        if options.get(name) is not None:
            refuse(name, options[name], "left out: the routers and gates of a converted model start near its source")
    config = spiral_config(source.config, **options)
    low, high = ROUTER_BIAS_RANGE
    if router_bias is not None and (config.topology != "mesh" or not config.chunk_sizes):
        refuse("router_bias", router_bias, "left out of a model without routers of MeSH")
    if router_bias is not None and not low <= router_bias <= high:
        refuse("router_bias", router_bias, f"a number in [{low:g}, {high:g}]")
    layers = layers_of(source)
    groups = default_core_layers(config, len(layers)) if core_layers is None else core_layers
    check_core_layers(groups, config, len(layers))
    target = AutoModelForCausalLM.from_config(config, dtype=common_dtype(source.parameters())).train(source.training)
    copy_outside_of_layers(source, target)
    prelude = [[i] for i in range(config.num_prelude_layers)]
    coda = [[i] for i in range(len(layers) - config.num_coda_layers, len(layers))]
    copies = ((target.model.prelude, prelude), (target.model.core, groups), (target.model.coda, coda))
    for stack, stack_groups in copies:
        for layer, group in zip(stack, stack_groups, strict=True):
            copy_layer([layers[index] for index in group], layer)
    if isinstance(target.model.topology, SpiralFormerMeSH):
        start_routers(target.model.topology, config, ROUTER_BIAS if router_bias is None else router_bias)
    if isinstance(target.model.topology, SpiralFormerHyperConnections):
        start_gates(target.model.topology, config)
    return target


@torch.no_grad()
def to_plain(source: SpiralFormerForCausalLM) -> PreTrainedModel:
    """
    A plain stack (`chunk_sizes=[]`) as the library's own model of its family, with the same tensors, logits and mode.

    Raises:
        ValueError: where `plain_config` does.
    """
    target = AutoModelForCausalLM.from_config(plain_config(source.config), dtype=common_dtype(source.parameters()))
    target.train(source.training)
    copy_outside_of_layers(source, target)
    for layer, copied in zip(layers_of(target), layers_of(source), strict=True):
        copy_layer([copied], layer)
    return target


# -- the source ----------------------------------------------------------------------------------------------------


def check_model_type(name_or_path: str, config: PreTrainedConfig, to: str) -> None:
    """Refuses, before its weights are read, a checkpoint that `to` cannot be made of."""
    allowed = [*FAMILY_OF] if to == "spiralformer" else ["spiralformer"]
    if config.model_type not in allowed:
        is_one = f'a checkpoint of a model_type in {allowed}, not "{config.model_type}"'
        refuse("model_name_or_path", name_or_path, is_one)
    if to != "spiralformer" and FAMILY_OF[to] != config.layer_family:
        refuse("to", to, f'that of layer_family "{config.layer_family}"')


def load_source(
    name_or_path: str, to: str = "spiralformer", gguf_file: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """
    A checkpoint with all of its weights, in its own dtype, and the tokenizer beside it; None where there is none.

    Args:
        name_or_path: folder or Hub name.
        to: what is to be made of it: "spiralformer", or a `model_type` of `FAMILY_OF`.
        gguf_file: the GGUF file in it that holds model and tokenizer; the library dequantises the weights.

    Raises:
        ValueError: where it is another architecture, lacks a weight or holds one too many, or where no such file is.
    """
    if gguf_file is not None:
        return load_gguf(name_or_path, to, gguf_file)
    config = load_config(name_or_path)
    check_model_type(name_or_path, config, to)
    tokenizer = load_tokenizer(name_or_path, None, "model_name_or_path") if has_tokenizer(name_or_path) else None
    return load_model(name_or_path, config, dtype="auto"), tokenizer


def load_gguf(name_or_path: str, to: str, gguf_file: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load_source` of a GGUF file."""
    if Path(name_or_path).exists() and not Path(name_or_path, gguf_file).is_file():
        refuse("gguf_file", gguf_file, f"a file of {name_or_path!r}")
    check_model_type(name_or_path, AutoConfig.from_pretrained(name_or_path, gguf_file=gguf_file), to)
    model, info = AutoModelForCausalLM.from_pretrained(
        name_or_path,
        gguf_file=gguf_file,
        dtype="auto",
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    check_loaded(f"{name_or_path}/{gguf_file}", model, info)
    return model, AutoTokenizer.from_pretrained(name_or_path, gguf_file=gguf_file)
