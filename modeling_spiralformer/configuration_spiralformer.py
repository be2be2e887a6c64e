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
"""Configuration of SpiralFormer: a looped Transformer whose shared core runs once per resolution."""

import dataclasses
import difflib
import hashlib
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import as_validated_field, strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import auto_docstring, logging
from transformers.utils.type_validators import interval

from .cache_name_spiralformer import CACHE_NAME
from .layers_spiralformer import FAMILIES, FAMILY_FIELDS

# A child of the library's own logger, so that its verbosity rules; the name of this module would not be one.
logger = logging.get_logger(f"transformers.{__name__}")

# Layer types of the KV cache, as `cache_spiralformer` registers them. A digest of the code is part of the name: other
# code, that came with a checkpoint, then has cache layers of its own. The name of the module would not do: the
# library puts configuration and model of a local folder into packages of different names.
CODE = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*_spiralformer.py")))
VERSION = hashlib.sha256(CODE).hexdigest()[:8]
TOKEN_LAYER_TYPE = f"spiralformer_token_attention_{VERSION}"
LATENT_LAYER_TYPE = f"spiralformer_latent_attention_{VERSION}"

# Types whose angles do not depend on the length seen so far (with the others a cached key would go stale), each with
# the parameters that it has beside those of every type.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")
    + ("mscale", "mscale_all_dim", "truncate"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
ROPE_PARAMETERS = ("rope_type", "rope_theta", "partial_rotary_factor")
ROPE_NUMBERS = {*ROPE_PARAMETERS, *(name for names in ROPE_TYPES.values() for name in names)} - {
    "rope_type",
    "truncate",
}
# Older names of rotary parameters, at the top of a configuration or in its rotary dictionaries; the last only there.
LEGACY_ROPE_NAMES = {
    "rotary_emb_base": "rope_theta",
    "rope_theta": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
    "partial_rotary_factor": "partial_rotary_factor",
}
NESTED_ROPE_NAMES = LEGACY_ROPE_NAMES | {"type": "rope_type"}
ROPE_DICTIONARIES = ("rope_parameters", "rope_scaling")
KEPT_ROPE_PARAMETERS = ("rope_theta", "partial_rotary_factor")  # of a checkpoint that is loaded with others
# Fields of other models whose layers see a window only: refused.
WINDOW_FIELDS = ("sliding_window", "use_sliding_window")
# Fields that configurations from before the families of layers lack: they take their defaults without a warning.
ADDED_FIELDS = ("layer_family", "norm", "rms_norm_eps", "num_key_value_heads", "head_dim", "mlp_bias")
# Fields that one topology has, and the others lack.
TOPOLOGY_FIELDS = {
    "mesh": ("num_memory_slots", "router_start", "first_routers"),
    "hyper_connections": ("num_streams", "gate_start"),
}
# How alike an unknown name and a field have to be (difflib's ratio) for the one to be taken for a slip of the other.
MISSPELT = 0.8


def refuse(field: str, value: object, allowed: str) -> None:
    """Raises the `ValueError` of every bad setting: the field, what came, and what is allowed."""
    raise ValueError(f"`{field}` must be {allowed}, but got {value!r}.")


# -- validators of one field: `@strict` runs them whenever the field is set, and names it in the error -------------


def checked(accepts: Callable[[Any], bool], allowed: str) -> Callable:
    """A field whose values, of the declared type, `accepts` takes: what the library's own validators do not say."""

    @as_validated_field
    def validate(value):
        if not accepts(value):
            raise ValueError(f"Value must be {allowed}, got {value!r}.")

    return validate


def is_positive(value: object) -> bool:
    """Whether `value` is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def is_floating(dtype: object) -> bool:
    """Whether `dtype` is None, or a floating-point dtype of torch or the name of one."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype is None or (isinstance(named, torch.dtype) and named.is_floating_point)


def numbers_all_labels(id2label: dict | None) -> bool:
    """Whether the labels are numbered 0, 1, 2, ..., in integers or, as JSON has them, in strings."""
    if id2label is None:
        return True
    return len(id2label) > 0 and {str(number) for number in id2label} == {str(n) for n in range(len(id2label))}


@as_validated_field
def rotary_parameters(parameters: dict | None):
    """Each rotary parameter by itself, under any of its names; `validate_rotary` looks at them together."""
    for name, value in (parameters or {}).items():
        current = NESTED_ROPE_NAMES.get(name, name)
        if current == "rope_type" and value not in [None, *ROPE_TYPES]:
            refuse(f"rope_parameters[{name!r}]", value, f"one of {list(ROPE_TYPES)}")
        if current in ROPE_NUMBERS and value is not None and not is_positive(value):
            refuse(f"rope_parameters[{name!r}]", value, "a finite number > 0")


# `interval` of the oldest supported release takes a bound of 0 for none: it serves where the bound is 1.
count_from_1 = interval(min=1)
count_from_0 = checked(lambda value: value >= 0, "an integer >= 0")
count_or_none = checked(lambda value: value is None or value >= 1, "None or an integer >= 1")
streams_or_none = checked(lambda value: value is None or 2 <= value <= 8, "None or an integer in [2, 8]")
sizes_from_1 = checked(lambda values: all(value >= 1 for value in values), "a list of integers >= 1")
tokens_or_none = checked(
    lambda values: values is None or all(value >= 0 for value in values), "None or a list of integers >= 0"
)
dropout_rate = checked(lambda value: 0 <= value < 1, "in [0, 1)")
dropout_rate_or_none = checked(lambda value: value is None or 0 <= value < 1, "None or in [0, 1)")
positive_number = checked(is_positive, "a finite number > 0")
positive_or_none = checked(lambda value: value is None or is_positive(value), "None or a finite number > 0")
activation_or_none = checked(lambda name: name is None or name in ACT2FN, f"None or one of {list(ACT2FN)}")
known_family = checked(lambda name: name in FAMILIES, f"one of {list(FAMILIES)}")
# "auto" is what the library sets where `from_pretrained` is given it; no saved configuration holds it.
floating_dtype = checked(
    lambda dtype: dtype == "auto" or is_floating(dtype), 'None, "auto" or a floating-point dtype of torch'
)
label_names = checked(numbers_all_labels, "None or the names of the labels 0, 1, 2, ...")


def unsaved_fields(topology: str | None) -> set[str]:
    """The fields that most configurations do not hold: those of streams where there are none, and what few set."""
    streams = () if topology == "hyper_connections" else TOPOLOGY_FIELDS["hyper_connections"]
    return {"output_initializer_range", "router_start", "first_routers", *streams}


def processes_of(config: PreTrainedConfig) -> int:
    """The processes that tensor parallelism deals the layers out to."""
    return getattr(getattr(config, "distributed_config", None), "tp_size", 1)


INTRODUCTION = r"""
Configuration of a SpiralFormer model. The defaults give the 160M SpiralFormer-B with MeSH of arXiv 2602.11698.

The model is written `N_pre + N_loop x {1/g_0, ..., 1/g_(T-1)} + N_post`: `num_prelude_layers` layers at token
resolution, `num_core_layers` shared layers that run once for each entry of `chunk_sizes`, over one latent per chunk of
g tokens, and `num_coda_layers` layers at token resolution again.

`num_hidden_layers` and `layer_types` follow from the schedule; they are read-only and never saved. Every impossible
value raises `StrictDataclassError` or `ValueError`, which names the field, the value and what is allowed, whenever the
field is set. Fields that do not go together raise it in the constructor, in that of the model and on saving.
"""


@auto_docstring(custom_intro=INTRODUCTION)
@strict
class SpiralFormerConfig(PreTrainedConfig):
    r"""
    layer_family (`str`):
        "gpt_neox", "llama" or "qwen3": whose layers these are. Fields that a family lacks are None, and refused
        otherwise. Those that it has take the defaults of that model where they are None.
    norm (`str`, *optional*):
        "layer_norm" or "rms_norm", in all layers and before the head. Default: that of the family.
    rms_norm_eps (`float`, *optional*):
        Epsilon of RMS norms, also of those of queries and keys (Qwen3), default 1e-6. None where there are none.
    layer_norm_eps (`float`, *optional*):
        Epsilon of layer norms, default 1e-5. None where there are none.
    num_key_value_heads (`int`, *optional*):
        Heads of keys and values, each read by an equal share of the `num_attention_heads` (grouped queries). Default
        `num_attention_heads`. Not with GPT-NeoX.
    head_dim (`int`, *optional*):
        Size of a head. Default hidden_size / num_attention_heads, which GPT-NeoX always has.
    mlp_bias (`bool`, *optional*):
        Whether the products of the MLP add a bias: Llama alone may choose. Default False.
    num_prelude_layers (`int`):
        Layers of f_pre. At least 1 where the first chunk size exceeds 1, because the first entry of the cache counts
        tokens.
    num_core_layers (`int`):
        Layers of f_loop, shared by all iterations. 0 exactly where `chunk_sizes` is empty.
    num_coda_layers (`int`):
        Layers of f_post.
    chunk_sizes (`list[int]`):
        g_t, one per iteration in the order in which they run (in the paper coarse to fine), each >= 1. Empty: no loop,
        a plain stack, such as GPT-NeoX or Llama.
    chunk_offsets (`list[int]`, *optional*):
        w_t in [0, g_t); the first chunk has g_t - w_t members. Default g // 2.
    causal_shifts (`list[int]`, *optional*):
        s_t >= g_t - 1, in tokens; less would leak the future. Default g - 1.
    down_scaling (`str`):
        "self_aggregation" (learned softmax over a chunk's members) or "mean".
    up_scaling (`str`):
        "allocation" (softmax over places, computed from the latent) or "broadcast" (1 / g).
    topology (`str`):
        "mesh", "hyper_connections", "anchor", "residual" or "base": how an iteration's update meets the state.
    num_memory_slots (`int`, *optional*):
        Slots of MeSH. Default T + 3. Refused with another topology.
    router_start (`str`, *optional*):
        What the routers of MeSH do in a new model: "uniform" gives all slots nearly the same, "pass_through" reads
        what was just written, "half_anchor" that and v in equal parts. Default "uniform". The last two need
        T + 2 slots. Refused with another topology.
    first_routers (`str`, *optional*):
        What the routers of MeSH's first cycle look at: "embeddings" (x) or "prelude" (v). Default "embeddings".
        Refused with another topology.
    num_streams (`int`, *optional*):
        Streams of hyper-connections, 2 to 8. Default 4. Refused with another topology.
    gate_start (`str`, *optional*):
        What the gates of hyper-connections do in a new model: "blend" keeps half of a stream and writes half of the
        new state, "replace" keeps almost nothing and writes almost all, "zero" has biases of 0. Default "blend".
        Refused with another topology.
    share_core (`bool`):
        False gives every iteration core layers of its own (the unlooped baseline).
    hidden_dropout (`float`, *optional*):
        In training, of the embeddings and of what each attention and MLP adds to the residual stream. Default 0. Not
        with Qwen3.
    initializer_range (`float`):
        Standard deviation of the matrices of a new model.
    output_initializer_range (`float`, *optional*):
        The same for the last product of each attention and MLP. Default initializer_range / sqrt(2 * layer calls).
    rope_parameters (`dict`, *optional*):
        Rotary embedding, default theta 10000; with GPT-NeoX on a quarter of each head, else on all of it.
    scale_embeddings (`bool`):
        Multiply the embeddings by sqrt(hidden_size).
    max_position_embeddings (`int`):
        Longest text the model is meant for, in tokens.
    use_parallel_residual (`bool`):
        Attention and MLP read the same state, as in `GPTNeoXConfig`. With GPT-NeoX alone.
    dtype (`str` or `torch.dtype`, *optional*):
        Floating-point dtype of the weights. Default that of the checkpoint; of a new model torch's default.
    """

    model_type = "spiralformer"
    keys_to_ignore_at_inference = [CACHE_NAME]

    vocab_size: int = count_from_1(default=50304)
    hidden_size: int = count_from_1(default=768)
    intermediate_size: int = count_from_1(default=3072)
    num_attention_heads: int = count_from_1(default=12)
    num_key_value_heads: int | None = count_or_none(default=None)
    head_dim: int | None = count_or_none(default=None)
    layer_family: str = known_family(default="gpt_neox")
    norm: Literal["layer_norm", "rms_norm"] | None = None
    num_prelude_layers: int = count_from_0(default=2)
    num_core_layers: int = count_from_0(default=4)
    num_coda_layers: int = count_from_0(default=2)
    chunk_sizes: list[int] | tuple[int, ...] = sizes_from_1(default=(8, 4, 2, 1))
    chunk_offsets: list[int] | tuple[int, ...] | None = tokens_or_none(default=None)
    causal_shifts: list[int] | tuple[int, ...] | None = tokens_or_none(default=None)
    down_scaling: Literal["self_aggregation", "mean"] = "self_aggregation"
    up_scaling: Literal["allocation", "broadcast"] = "allocation"
    topology: Literal["mesh", "hyper_connections", "anchor", "residual", "base"] = "mesh"
    num_memory_slots: int | None = count_or_none(default=None)
    router_start: Literal["uniform", "pass_through", "half_anchor"] | None = None
    first_routers: Literal["embeddings", "prelude"] | None = None
    num_streams: int | None = streams_or_none(default=None)
    gate_start: Literal["blend", "replace", "zero"] | None = None
    share_core: bool = True
    rope_parameters: dict | None = rotary_parameters(default=None)
    scale_embeddings: bool = True
    max_position_embeddings: int = count_from_1(default=4096)
    use_parallel_residual: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    hidden_act: str | None = activation_or_none(default=None)
    layer_norm_eps: float | None = positive_or_none(default=None)
    rms_norm_eps: float | None = positive_or_none(default=None)
    attention_dropout: float | int = dropout_rate(default=0.0)
    hidden_dropout: float | int | None = dropout_rate_or_none(default=None)
    classifier_dropout: float | int = dropout_rate(default=0.1)
    initializer_range: float = positive_number(default=0.02)
    output_initializer_range: float | None = positive_or_none(default=None)
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    use_cache: bool = True
    # The library's own fields once more: it leaves their types as text, which `@strict` does not read.
    dtype: str | torch.dtype | None = floating_dtype(default=None)
    id2label: dict[int, str] | dict[str, str] | None = label_names(default=None)
    label2id: dict[str, int] | dict[str, str] | None = None
    problem_type: Literal["regression", "single_label_classification", "multi_label_classification"] | None = None

    def __post_init__(self, **kwargs):
        for fault in self.misspelt_fields(kwargs):
            logger.warning(f"SpiralFormerConfig: {fault}")
        for name, dtype in (("dtype", self.dtype), ("torch_dtype", kwargs.get("torch_dtype"))):
            if not is_floating(dtype):
                refuse(name, dtype, "None or a floating-point dtype of torch")
        self._fill_in_family()
        super().__post_init__(**kwargs)

    def _fill_in_family(self):
        """Gives the fields that the family of layers has its defaults, where they are None."""
        defaults = FAMILIES[self.layer_family].fields(self.norm)
        if "head_dim" in defaults:
            defaults["num_key_value_heads"] = self.num_attention_heads
            if self.hidden_size % self.num_attention_heads == 0:  # `validate_architecture` refuses it otherwise
                defaults["head_dim"] = self.hidden_size // self.num_attention_heads
        for field, value in defaults.items():
            if getattr(self, field) is None:
                setattr(self, field, value)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As the library does, with a warning for everything that no saved configuration is like."""
        for fault in cls.find_faults(config_dict, given=kwargs) + cls.misspelt_fields(kwargs):
            logger.warning(f"SpiralFormerConfig: {fault}")
        # The library would set these, unread, beside the `rope_parameters` that they belong to, or drop them.
        unread = {name: kwargs.pop(name) for name in list(kwargs) if name in (*LEGACY_ROPE_NAMES, *WINDOW_FIELDS)}
        # A dictionary would take the place of the saved one, and theta and the share of each head would be lost.
        given = {name: kwargs.pop(name) for name in ROPE_DICTIONARIES if isinstance(kwargs.get(name), dict)}
        if given:
            named = {NESTED_ROPE_NAMES.get(name, name) for parameters in given.values() for name in parameters}
            saved: dict = next((config_dict[name] for name in ROPE_DICTIONARIES if config_dict.get(name)), {})
            kept = {name: saved[name] for name in KEPT_ROPE_PARAMETERS if name in saved and name not in named}
            unread |= {"rope_scaling": None, **given, "rope_parameters": kept | given.get("rope_parameters", {})}
        return super().from_dict(config_dict | unread, **kwargs)

    @classmethod
    def misspelt_fields(cls, names: Iterable[str]) -> list[str]:
        """One sentence for each of `names` that nothing knows and that is nearly the name of a field."""
        fields = [item.name for item in dataclasses.fields(cls)] + ["model_type", "rope_scaling", *LEGACY_ROPE_NAMES]
        known = {*fields, *dir(cls), "sep_token_id", "num_beams"}  # of many other models, and of their generation
        faults = []
        for name in names:
            meant = difflib.get_close_matches(name.lower().replace("-", "_"), fields, n=1, cutoff=MISSPELT)
            if meant and name not in known:
                faults.append(f"`{name}` is no field and changes nothing; `{meant[0]}` is one.")
        return faults

    @classmethod
    def find_faults(cls, config_dict: dict, given: Iterable[str] = ()) -> list[str]:
        """One sentence for each field that every saved configuration holds and neither `config_dict` nor `given` does.

        And one where the names of the labels disagree.
        """
        common = {item.name for item in dataclasses.fields(PreTrainedConfig)}
        own = [item for item in dataclasses.fields(cls) if item.name not in common]
        older = () if "layer_family" in config_dict else ADDED_FIELDS
        families = [FAMILIES[name] for name in FAMILIES if name == config_dict.get("layer_family", "gpt_neox")]
        known = [field for family in families for field in family.fields(config_dict.get("norm"))]
        lacked = {*FAMILY_FIELDS} - {*known}
        lacked |= {field for family in families for field in family.more_fields}  # some came later than their family
        lacked |= unsaved_fields(config_dict.get("topology"))
        missing = [f"`{item.name}`" for item in own if item.name not in {*config_dict, *given, *older, *lacked}]
        if "rope_parameters" in config_dict:
            rotary = [config_dict.get(name) for name in ("rope_parameters", "rope_scaling")]
            rotary.append({name: value for name, value in config_dict.items() if name in LEGACY_ROPE_NAMES})
            parts = [parameters for parameters in rotary if isinstance(parameters, dict)]
            named = {NESTED_ROPE_NAMES.get(name, name) for part in parts for name in part if part[name] is not None}
            missing += [f"`rope_parameters['{name}']`" for name in ROPE_PARAMETERS if name not in named]
        faults = [f"{field} is missing and takes its default." for field in missing]
        null = [field for field in known if field in config_dict and config_dict[field] is None]
        faults += [f"`{field}` is null and takes its default." for field in null]
        names, numbers = (config_dict.get(field) or {} for field in ("id2label", "label2id"))
        both = isinstance(names, dict) and isinstance(numbers, dict)
        if both and {str(number): name for name, number in numbers.items()} != {str(n): names[n] for n in names}:
            faults.append("`label2id` is not `id2label` the other way round.")
        return faults

    def to_dict(self) -> dict[str, Any]:
        """As the library does, without the fields that the family of layers lacks, or a topology without streams.

        Others look for a field there, such as the heads of keys, and know what to do where there is none.
        """
        values = super().to_dict()
        lacked = {*FAMILY_FIELDS} | unsaved_fields(self.topology)
        return {name: value for name, value in values.items() if value is not None or name not in lacked}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """Saves as the library does, with the model's code beside it and a class for every Auto class in `auto_map`.

        What is saved, or pushed, loads without this package by `trust_remote_code=True`.
        """
        # The one import that runs upwards. The library copies a file's relative imports with it, found in its text:
        # this line brings the model's file, also where a configuration is saved or pushed alone. A model could bring
        # the code by its own class only, and FSDP makes classes that no file holds.
        from .modeling_spiralformer import AUTO_CLASSES

        classes: dict[str, type] = {"AutoConfig": type(self), **AUTO_CLASSES}
        known = {name: f"{cls.__module__.split('.')[-1]}.{cls.__name__}" for name, cls in classes.items()}
        self.auto_map = known | (getattr(self, "auto_map", None) or {})
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # -- derived from the schedule ------------------------------------------------------------------------------

    @property
    def num_iterations(self) -> int:
        """T, the number of times the core runs."""
        return len(self.chunk_sizes)

    @property
    def resolved_chunk_offsets(self) -> list[int]:
        """w_t for every iteration, the default g // 2 filled in."""
        return [g // 2 for g in self.chunk_sizes] if self.chunk_offsets is None else list(self.chunk_offsets)

    @property
    def resolved_causal_shifts(self) -> list[int]:
        """s_t for every iteration, the default g - 1 filled in."""
        return [g - 1 for g in self.chunk_sizes] if self.causal_shifts is None else list(self.causal_shifts)

    @property
    def resolved_num_memory_slots(self) -> int:
        """Number of MeSH slots, the default T + 3 filled in."""
        return self.num_iterations + 3 if self.num_memory_slots is None else self.num_memory_slots

    @property
    def resolved_router_start(self) -> str:
        """How the routers of MeSH start, the default filled in."""
        return self.router_start or "uniform"

    @property
    def resolved_first_routers(self) -> str:
        """What the routers of MeSH's first cycle look at, the default filled in."""
        return self.first_routers or "embeddings"

    @property
    def resolved_num_streams(self) -> int:
        """Number of streams of hyper-connections, the default 4 filled in."""
        return 4 if self.num_streams is None else self.num_streams

    @property
    def resolved_gate_start(self) -> str:
        """How the gates of hyper-connections start, the default filled in."""
        return self.gate_start or "blend"

    @property
    def resolved_output_initializer_range(self) -> float:
        """Standard deviation of what writes to the residual stream, the default filled in."""
        return self.output_initializer_range or self.initializer_range / math.sqrt(2 * self.num_hidden_layers)

    @property
    def resolved_num_key_value_heads(self) -> int:
        """Heads of keys and values, as many as queries where the family has no other."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def resolved_head_dim(self) -> int:
        """Size of a head, the default hidden_size / num_attention_heads filled in."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism shards the layers: as the library shards those of their own model."""
        plan = FAMILIES[self.layer_family].layer_tp_plan
        counts = {"prelude": self.num_prelude_layers, "core": self.num_core_layers, "coda": self.num_coda_layers}
        layers = {f"{part}.*.{name}": style for part in counts if counts[part] for name, style in plan.items()}
        return layers | vars(self).get("base_model_tp_plan", {})

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan):
        # transformers 5.17 adds embeddings that are tied; under this name, what is kept is not saved.
        if plan is None or not plan.items() >= self.base_model_tp_plan.items():
            refuse("base_model_tp_plan", plan, "left alone or added to: it follows from the layer_family")
        layers = ("prelude.", "core.", "coda.")
        vars(self)["base_model_tp_plan"] = {name: plan[name] for name in plan if not name.startswith(layers)}

    @property
    def num_hidden_layers(self) -> int:
        """Attention calls in one forward: prelude + T * core + coda. One cache entry each."""
        return len(self.layer_types)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value):
        refuse("num_hidden_layers", value, "left alone: it follows from the schedule")

    @property
    def layer_types(self) -> list[str]:
        """The kind of every cache entry: tokens in prelude and coda, latents in each (iteration, core layer)."""
        latent_entries = self.num_iterations * self.num_core_layers
        return (
            [TOKEN_LAYER_TYPE] * self.num_prelude_layers
            + [LATENT_LAYER_TYPE] * latent_entries
            + [TOKEN_LAYER_TYPE] * self.num_coda_layers
        )

    @layer_types.setter
    def layer_types(self, value):
        refuse("layer_types", value, "left alone: it follows from the schedule")

    def core_entries(self, iteration: int) -> range:
        """Entries of the cache that the core layers of an iteration have: those of the prelude come before them.

        The order is prelude, core layers of iteration 0, of iteration 1, ..., coda. Raises ValueError for an iteration
        that the schedule lacks.
        """
        if iteration not in range(self.num_iterations):
            refuse("iteration", iteration, f"one of the {self.num_iterations} of the schedule, counted from 0")
        first = self.num_prelude_layers + iteration * self.num_core_layers
        return range(first, first + self.num_core_layers)

    # -- several fields together: `@strict` runs every `validate_*` at construction and on saving, the model once more.
    # Not when a field is set: two fields that go together could not be changed one after the other.

    def validate_architecture(self):
        """Heads share the width, and queries the heads of keys and values."""
        heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            refuse("hidden_size", self.hidden_size, f"a multiple of num_attention_heads ({heads})")
        if self.num_key_value_heads is not None and heads % self.num_key_value_heads:
            refuse("num_key_value_heads", self.num_key_value_heads, f"a divisor of num_attention_heads ({heads})")

    def validate_layer_family(self):
        """What the family of layers lacks is None, and what it has is not; likewise the epsilons of its norms."""
        has = FAMILIES[self.layer_family].fields(self.norm)
        family = f'with layer_family "{self.layer_family}" and norm "{self.norm}"'
        for field in FAMILY_FIELDS:
            value = getattr(self, field)
            if (value is not None) != (field in has):
                refuse(field, value, f"{'set' if field in has else 'None'} {family}")
        for field in WINDOW_FIELDS:
            if getattr(self, field, None):
                refuse(field, getattr(self, field), "left out: every layer attends to the whole text")

    def validate_schedule(self):
        """Chunk sizes, offsets and shifts, and the layer counts that go with them.

        Tuples become lists, and a list that was changed in place is looked at again.
        """
        for field in ("chunk_sizes", "chunk_offsets", "causal_shifts"):
            values = getattr(self, field)
            if values is not None:
                setattr(self, field, list(values))
                if len(values) != self.num_iterations:
                    refuse(field, values, f"a list of {self.num_iterations}, one for each of the chunk_sizes")
        for size, offset, shift in zip(
            self.chunk_sizes, self.resolved_chunk_offsets, self.resolved_causal_shifts, strict=True
        ):
            if offset >= size:
                refuse("chunk_offsets", self.chunk_offsets, f"in [0, g): below {size} for chunk size {size}")
            if shift < size - 1:
                refuse("causal_shifts", self.causal_shifts, f"at least g - 1 = {size - 1} for chunk size {size}")
        if self.chunk_sizes and self.num_core_layers < 1:
            refuse("num_core_layers", self.num_core_layers, f">= 1 with chunk_sizes {self.chunk_sizes}")
        if not self.chunk_sizes and self.num_core_layers != 0:
            refuse("num_core_layers", self.num_core_layers, "0 where chunk_sizes is empty")
        if self.num_hidden_layers < 1:
            refuse("num_prelude_layers", self.num_prelude_layers, ">= 1 where there is neither core nor coda")
        starts_coarse = bool(self.chunk_sizes) and self.chunk_sizes[0] > 1
        if starts_coarse and self.num_prelude_layers < 1:
            allowed = f">= 1 where the first chunk size ({self.chunk_sizes[0]}) exceeds 1: cache entry 0 counts tokens"
            refuse("num_prelude_layers", self.num_prelude_layers, allowed)

    def validate_topology(self):
        """MeSH alone has slots, hyper-connections alone have streams, and both only where there is a loop."""
        for topology, fields in TOPOLOGY_FIELDS.items():
            for field in fields:
                value = getattr(self, field)
                if value is not None and self.topology != topology:
                    refuse(field, value, f'None with topology "{self.topology}"')
                if value is not None and not self.chunk_sizes:
                    refuse(field, value, "None where chunk_sizes is empty")
        least = self.num_iterations + 2
        if self.resolved_router_start != "uniform" and self.resolved_num_memory_slots < least:
            allowed = f'None or >= T + 2 = {least} with router_start "{self.router_start}"'
            refuse("num_memory_slots", self.num_memory_slots, allowed)

    def validate_rotary(self):
        """The rotary embedding: fixed angles, on an even number of dimensions of each head.

        Fills in the defaults first: an override at `from_pretrained` arrives without them.
        """
        self.convert_rope_params_to_dict()
        parameters: dict = self.rope_parameters or {}
        rope_type = parameters["rope_type"]
        allowed = [*ROPE_PARAMETERS, *ROPE_TYPES[rope_type]]
        for field, value in parameters.items():
            if field not in allowed:
                refuse(f"rope_parameters[{field!r}]", value, f"left out: rope_type {rope_type!r} has {allowed}")
        share, head_size = parameters["partial_rotary_factor"], self.resolved_head_dim
        if share != 1 and FAMILIES[self.layer_family].partial_rotary_factor is None:
            refuse("rope_parameters['partial_rotary_factor']", share, f'1 with layer_family "{self.layer_family}"')
        rotary_dims = int(head_size * share)
        if share > 1 or rotary_dims < 2 or rotary_dims % 2:
            even = f"in (0, 1] and give an even number >= 2 of the {head_size} dimensions of a head"
            refuse("rope_parameters['partial_rotary_factor']", share, even)

    def validate_layer_type(self):
        """Nothing to check: `layer_types` is derived, and the library's list does not know latents."""

    def convert_rope_params_to_dict(self, **kwargs):
        """Fills in the rotary defaults: theta 10000, and the family's share of each head (the library's is all)."""
        given = {"rope_parameters": self.rope_parameters, "rope_scaling": kwargs.pop("rope_scaling", None)}
        given |= {name: {name: kwargs.pop(name)} for name in list(kwargs) if name in LEGACY_ROPE_NAMES}
        merged: dict = {}
        for source, parameters in given.items():
            if parameters is not None and not isinstance(parameters, dict):
                refuse(source, parameters, "None or a dict")
            for name, value in (parameters or {}).items():
                name = NESTED_ROPE_NAMES.get(name, name)
                field = source if source in LEGACY_ROPE_NAMES else f"{source}[{name!r}]"
                if isinstance(value, dict):
                    refuse(field, value, "one value for all layers")
                if value is not None and merged.setdefault(name, value) != value:
                    refuse(field, value, f"given once, and was {merged[name]!r} before")
        share = FAMILIES[self.layer_family].partial_rotary_factor or 1.0
        self.rope_parameters = {"rope_theta": 10000.0, "partial_rotary_factor": share, **merged}
        self.standardize_rope_params()
        return kwargs


__all__ = ["SpiralFormerConfig"]
