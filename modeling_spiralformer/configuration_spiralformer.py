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
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import auto_docstring, logging

from .cache_name_spiralformer import CACHE_NAME

# A child of the library's own logger, so that its verbosity rules; the name of this module would not be one.
logger = logging.get_logger(f"transformers.{__name__}")

# Layer types of the KV cache, as `cache_spiralformer` registers them. A digest of the code is part of the name: other
# code, that came with a checkpoint, then has cache layers of its own. The name of the module would not do: the
# library puts configuration and model of a local folder into packages of different names.
CODE = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*_spiralformer.py")))
VERSION = hashlib.sha256(CODE).hexdigest()[:8]
TOKEN_LAYER_TYPE = f"spiralformer_token_attention_{VERSION}"
LATENT_LAYER_TYPE = f"spiralformer_latent_attention_{VERSION}"

DOWN_SCALINGS = ("self_aggregation", "mean")
UP_SCALINGS = ("allocation", "broadcast")
TOPOLOGIES = ("mesh", "anchor", "residual", "base")
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
# Older names of rotary parameters, at the top of a configuration or in its rotary dictionaries; the last only there.
LEGACY_ROPE_NAMES = {
    "rotary_emb_base": "rope_theta",
    "rope_theta": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
    "partial_rotary_factor": "partial_rotary_factor",
}
NESTED_ROPE_NAMES = LEGACY_ROPE_NAMES | {"type": "rope_type"}
# How alike an unknown name and a field have to be (difflib's ratio) for the one to be taken for a slip of the other.
MISSPELT = 0.8


def refuse(field: str, value: object, allowed: str) -> None:
    """Raises the `ValueError` of every bad setting: the field, what came, and what is allowed."""
    raise ValueError(f"`{field}` must be {allowed}, but got {value!r}.")


def check_integers(field: str, values: object, length: int | None, minimum: int) -> None:
    """Refuses `values` unless it is a list of integers, of the given length, none of them below `minimum`."""
    count = "" if length is None else f", one for each of {length} chunk_sizes"
    is_list = isinstance(values, (list, tuple)) and all(type(value) is int and value >= minimum for value in values)
    if not is_list or (length is not None and len(values) != length):
        refuse(field, values, f"a list of integers >= {minimum}{count}")


def check_positive(field: str, value: object) -> None:
    """Refuses `value` unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        refuse(field, value, "a finite number > 0")


INTRODUCTION = r"""
Configuration of a SpiralFormer model. The defaults give the 160M SpiralFormer-B with MeSH of arXiv 2602.11698.

The model is written `N_pre + N_loop x {1/g_0, ..., 1/g_(T-1)} + N_post`: `num_prelude_layers` layers at token
resolution, `num_core_layers` shared layers that run once for each entry of `chunk_sizes`, over one latent per chunk of
g tokens, and `num_coda_layers` layers at token resolution again.

`num_hidden_layers` and `layer_types` follow from the schedule; they are read-only and never saved. Every impossible
value raises `StrictDataclassError`, which names the field, the value and what is allowed.
"""


@auto_docstring(custom_intro=INTRODUCTION)
@strict
class SpiralFormerConfig(PreTrainedConfig):
    r"""
    num_prelude_layers (`int`):
        Layers of f_pre. At least 1 where the first chunk size exceeds 1, because the first slot of the cache counts
        tokens.
    num_core_layers (`int`):
        Layers of f_loop, shared by all iterations. 0 exactly where `chunk_sizes` is empty.
    num_coda_layers (`int`):
        Layers of f_post.
    chunk_sizes (`list[int]`):
        g_t, one per iteration, each >= 1. Empty: no loop, a plain GPT-NeoX stack.
    chunk_offsets (`list[int]`, *optional*):
        w_t in [0, g_t); the first chunk has g_t - w_t members. Default g // 2.
    causal_shifts (`list[int]`, *optional*):
        s_t >= g_t - 1, in tokens; less would leak the future. Default g - 1.
    down_scaling (`str`):
        "self_aggregation" (learned softmax over a chunk's members) or "mean".
    up_scaling (`str`):
        "allocation" (softmax over slots, computed from the latent) or "broadcast" (1 / g).
    topology (`str`):
        "mesh", "anchor", "residual" or "base": how an iteration's update meets the state.
    num_memory_slots (`int`, *optional*):
        Slots B of MeSH. Default T + 3. Refused with another topology.
    share_core (`bool`):
        False gives every iteration core layers of its own (the unlooped baseline).
    rope_parameters (`dict`, *optional*):
        Rotary embedding, default theta 10000 on a quarter of each head.
    scale_embeddings (`bool`):
        Multiply the embeddings by sqrt(hidden_size).
    max_position_embeddings (`int`):
        Longest text the model is meant for, in tokens.
    use_parallel_residual (`bool`):
        Attention and MLP read the same state, as in `GPTNeoXConfig`.
    """

    model_type = "spiralformer"
    keys_to_ignore_at_inference = [CACHE_NAME]

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_prelude_layers: int = 2
    num_core_layers: int = 4
    num_coda_layers: int = 2
    chunk_sizes: list[int] | tuple[int, ...] = (8, 4, 2, 1)
    chunk_offsets: list[int] | tuple[int, ...] | None = None
    causal_shifts: list[int] | tuple[int, ...] | None = None
    down_scaling: str = "self_aggregation"
    up_scaling: str = "allocation"
    topology: str = "mesh"
    num_memory_slots: int | None = None
    share_core: bool = True
    rope_parameters: dict | None = None
    scale_embeddings: bool = True
    max_position_embeddings: int = 4096
    use_parallel_residual: bool = True
    attention_bias: bool = True
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        for fault in self.misspelt_fields(kwargs):
            logger.warning(f"SpiralFormerConfig: {fault}")
        for name, dtype in (("dtype", self.dtype), ("torch_dtype", kwargs.get("torch_dtype"))):
            named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
            if dtype is not None and not (isinstance(named, torch.dtype) and named.is_floating_point):
                refuse(name, dtype, "None or a floating-point dtype of torch")
        if self.id2label is not None:
            numbers = [str(number) for number in self.id2label] if isinstance(self.id2label, dict) else []
            if not numbers or set(numbers) != {str(number) for number in range(len(numbers))}:
                refuse("id2label", self.id2label, "None or the names of the labels 0, 1, 2, ...")
        if not isinstance(self.label2id, dict | None):
            refuse("label2id", self.label2id, "None or the numbers of the labels")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As the library does, with a warning for everything that no saved configuration is like."""
        for fault in cls.find_faults(config_dict, given=kwargs) + cls.misspelt_fields(kwargs):
            logger.warning(f"SpiralFormerConfig: {fault}")
        # The library would set these, unread, beside the `rope_parameters` that they belong to, or drop them.
        older = {name: kwargs.pop(name) for name in list(kwargs) if name in LEGACY_ROPE_NAMES}
        return super().from_dict(config_dict | older, **kwargs)

    @classmethod
    def misspelt_fields(cls, names: Iterable[str]) -> list[str]:
        """One sentence for each of `names` that nothing knows and that is nearly the name of a field."""
        fields = [item.name for item in dataclasses.fields(cls)] + ["model_type", "rope_scaling", *LEGACY_ROPE_NAMES]
        known = {*fields, *dir(cls), "sep_token_id"}  # the last of many other models
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
        missing = [f"`{item.name}`" for item in own if item.name not in {*config_dict, *given}]
        if "rope_parameters" in config_dict:
            rotary = [config_dict.get(name) for name in ("rope_parameters", "rope_scaling")]
            given = [parameters for parameters in rotary if isinstance(parameters, dict)]
            given.append({name: value for name, value in config_dict.items() if name in LEGACY_ROPE_NAMES})
            named = {NESTED_ROPE_NAMES.get(name, name) for part in given for name in part if part[name] is not None}
            missing += [f"`rope_parameters['{name}']`" for name in ROPE_PARAMETERS if name not in named]
        faults = [f"{field} is missing and takes its default." for field in missing]
        names, numbers = (config_dict.get(field) or {} for field in ("id2label", "label2id"))
        both = isinstance(names, dict) and isinstance(numbers, dict)
        if both and {str(number): name for name, number in numbers.items()} != {str(n): names[n] for n in names}:
            faults.append("`label2id` is not `id2label` the other way round.")
        return faults

    def save_pretrained(self, save_directory, **kwargs):
        """Saves as the library does, with the model's code beside it and a class for every Auto class in `auto_map`.

        What is saved, or pushed, loads without this package by `trust_remote_code=True`.
        """
        # The library copies a file's relative imports with it, found in its text: this line brings the model's file.
        from .modeling_spiralformer import AUTO_CLASSES

        known = {"AutoConfig": type(self)} | AUTO_CLASSES
        known = {name: f"{cls.__module__.split('.')[-1]}.{cls.__name__}" for name, cls in known.items()}
        self.auto_map = known | (getattr(self, "auto_map", None) or {})
        super().save_pretrained(save_directory, **kwargs)

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
    def num_hidden_layers(self) -> int:
        """Attention calls in one forward: prelude + T * core + coda. One cache slot each."""
        return len(self.layer_types)

    @num_hidden_layers.setter
    def num_hidden_layers(self, value):
        refuse("num_hidden_layers", value, "left alone: it follows from the schedule")

    @property
    def layer_types(self) -> list[str]:
        """The kind of every cache slot: tokens in prelude and coda, latents in each (iteration, core layer)."""
        latent_slots = self.num_iterations * self.num_core_layers
        return (
            [TOKEN_LAYER_TYPE] * self.num_prelude_layers
            + [LATENT_LAYER_TYPE] * latent_slots
            + [TOKEN_LAYER_TYPE] * self.num_coda_layers
        )

    @layer_types.setter
    def layer_types(self, value):
        refuse("layer_types", value, "left alone: it follows from the schedule")

    def core_entries(self, iteration: int) -> range:
        """The cache entries of an iteration's core layers."""
        first = self.num_prelude_layers + iteration * self.num_core_layers
        return range(first, first + self.num_core_layers)

    # -- validation: `@strict` runs every `validate_*` at construction, and the model runs them once more -------

    def validate_architecture(self):
        """The widths and counts of the stack."""
        for field in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"):
            if getattr(self, field) < 1:
                refuse(field, getattr(self, field), "an integer >= 1")
        if self.hidden_size % self.num_attention_heads:
            refuse("hidden_size", self.hidden_size, f"a multiple of num_attention_heads ({self.num_attention_heads})")
        for field in ("num_prelude_layers", "num_core_layers", "num_coda_layers"):
            if getattr(self, field) < 0:
                refuse(field, getattr(self, field), "an integer >= 0")
        if self.max_position_embeddings < 1:
            refuse("max_position_embeddings", self.max_position_embeddings, "an integer >= 1")

    def validate_schedule(self):
        """Chunk sizes, offsets and shifts (tuples become lists), and the layer counts that go with them."""
        for field in ("chunk_sizes", "chunk_offsets", "causal_shifts"):
            if isinstance(getattr(self, field), tuple):
                setattr(self, field, list(getattr(self, field)))
        check_integers("chunk_sizes", self.chunk_sizes, length=None, minimum=1)
        if self.chunk_offsets is not None:
            check_integers("chunk_offsets", self.chunk_offsets, self.num_iterations, minimum=0)
        if self.causal_shifts is not None:
            check_integers("causal_shifts", self.causal_shifts, self.num_iterations, minimum=0)
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
            allowed = f">= 1 where the first chunk size ({self.chunk_sizes[0]}) exceeds 1: cache slot 0 counts tokens"
            refuse("num_prelude_layers", self.num_prelude_layers, allowed)

    def validate_choices(self):
        """The options that are one of a few words, and the number of MeSH slots."""
        for field, allowed in (
            ("down_scaling", DOWN_SCALINGS),
            ("up_scaling", UP_SCALINGS),
            ("topology", TOPOLOGIES),
        ):
            if getattr(self, field) not in allowed:
                refuse(field, getattr(self, field), f"one of {list(allowed)}")
        if self.hidden_act not in ACT2FN:
            refuse("hidden_act", self.hidden_act, f"one of {sorted(ACT2FN)}")
        if self.num_memory_slots is not None:
            if self.topology != "mesh":
                refuse("num_memory_slots", self.num_memory_slots, f'None with topology "{self.topology}"')
            if not self.chunk_sizes:
                refuse("num_memory_slots", self.num_memory_slots, "None where chunk_sizes is empty")
            if self.num_memory_slots < 1:
                refuse("num_memory_slots", self.num_memory_slots, "None or an integer >= 1")

    def validate_rotary(self):
        """The rotary embedding: fixed angles, on an even number of dimensions of each head.

        Fills in the defaults first: an override at `from_pretrained` arrives without them.
        """
        self.convert_rope_params_to_dict()
        rope_type = self.rope_parameters["rope_type"]
        if rope_type not in list(ROPE_TYPES):  # a list takes what has no hash
            refuse("rope_parameters['rope_type']", rope_type, f"one of {list(ROPE_TYPES)}")
        allowed = [*ROPE_PARAMETERS, *ROPE_TYPES[rope_type]]
        for field, value in self.rope_parameters.items():
            if field not in allowed:
                refuse(f"rope_parameters[{field!r}]", value, f"left out: rope_type {rope_type!r} has {allowed}")
            if field not in ("rope_type", "truncate"):
                check_positive(f"rope_parameters['{field}']", value)
        share, head_size = self.rope_parameters["partial_rotary_factor"], self.hidden_size // self.num_attention_heads
        rotary_dims = int(head_size * share)
        if share > 1 or rotary_dims < 2 or rotary_dims % 2:
            allowed = f"in (0, 1] and give an even number >= 2 of the {head_size} dimensions of a head"
            refuse("rope_parameters['partial_rotary_factor']", share, allowed)

    def validate_rates(self):
        """Dropouts and scales."""
        for field in ("attention_dropout", "hidden_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, field) < 1:
                refuse(field, getattr(self, field), "in [0, 1)")
        for field in ("layer_norm_eps", "initializer_range"):
            check_positive(field, getattr(self, field))

    def validate_layer_type(self):
        """Nothing to check: `layer_types` is derived, and the library's list does not know latents."""

    def convert_rope_params_to_dict(self, **kwargs):
        """Fills in GPT-NeoX's rotary defaults: theta 10000, a quarter of each head (the library's would be all)."""
        given = {"rope_parameters": self.rope_parameters, "rope_scaling": kwargs.pop("rope_scaling", None)}
        given |= {name: {name: kwargs.pop(name)} for name in list(kwargs) if name in LEGACY_ROPE_NAMES}
        merged: dict = {}
        for source, parameters in given.items():
            if parameters is not None and not isinstance(parameters, dict):
                refuse(source, parameters, "None or a dict")
            for name, value in (parameters or {}).items():
                name = NESTED_ROPE_NAMES.get(name, name)
                if isinstance(value, dict):
                    refuse(f"{source}[{name!r}]", value, "one value for all layers")
                if value is not None and merged.setdefault(name, value) != value:
                    refuse(f"{source}[{name!r}]", value, f"given once, and was {merged[name]!r} before")
        self.rope_parameters = {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, **merged}
        self.standardize_rope_params()
        return kwargs


__all__ = ["SpiralFormerConfig"]
