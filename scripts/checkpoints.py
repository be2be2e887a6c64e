"""Configurations, weights and tokenizers from a folder or the Hub, refused where they do not fit together."""

import ast
import dataclasses
import json
import re

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_spiralformer import SpiralFormerConfig

# Keys that a message lists before it stops.
LISTED_KEYS = 5


def parse_override(text: str) -> object:
    """The value of one override: JSON or Python notation (lists, numbers, true, None), otherwise the text itself."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text


def parse_overrides(overrides: str | None) -> dict[str, object]:
    """Reads "a=1,b=[4,2,1],c=anchor". A comma separates two settings only where a name and "=" follow it."""
    settings = {}
    for item in re.split(r",(?=\s*\w+\s*=)", overrides) if overrides else []:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ValueError(f'`config_overrides` must read "key=value,key=value", but got {item!r}.')
        settings[key.strip()] = parse_override(value.strip())
    return settings


def check_fields(name_or_path: str, config_class: type[SpiralFormerConfig]):
    """Raises ValueError where a configuration holds a misspelt field, or lacks one that every saved one holds."""
    config_dict, _ = config_class.get_config_dict(name_or_path)
    faults = config_class.misspelt_fields(config_dict) + config_class.find_faults(config_dict)
    if faults:
        raise ValueError(f"The config.json of {name_or_path!r} must be as it was saved: {' '.join(faults)}")


def load_config(name_or_path: str, overrides: dict[str, object] | None = None) -> PreTrainedConfig:
    """The configuration of a folder or Hub name, with some fields changed and all of them validated again."""
    config = AutoConfig.from_pretrained(name_or_path)
    if isinstance(config, SpiralFormerConfig):
        check_fields(name_or_path, type(config))
    known = sorted(item.name for item in dataclasses.fields(config))
    for key, value in (overrides or {}).items():
        if key not in known:
            raise ValueError(
                f"`config_overrides` must name fields of {type(config).__name__}, but got {key!r}: {known}."
            )
        setattr(config, key, value)
    config.validate()
    return config


def load_model(
    name_or_path: str,
    config: PreTrainedConfig,
    model_class: type = AutoModelForCausalLM,
    dtype: torch.dtype | str = torch.float32,
    allow_unused: bool = True,
) -> PreTrainedModel:
    """
    A model (by default a causal language model) with the weights of a checkpoint, in `dtype` ("auto": as saved).

    Raises ValueError where the checkpoint lacks a weight, which the library would fill with random numbers, where its
    file cannot be read, and without `allow_unused` where it holds a weight that the model does not have.
    """
    try:
        model, info = model_class.from_pretrained(name_or_path, config=config, dtype=dtype, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"The checkpoint {name_or_path!r} has a damaged safetensors file: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"The checkpoint {name_or_path!r} lacks {len(missing)} weights that this configuration needs, "
            f"among them {missing[:LISTED_KEYS]}."
        )
    if info["unexpected_keys"] and not allow_unused:
        unused = sorted(info["unexpected_keys"])
        raise ValueError(
            f"The checkpoint {name_or_path!r} holds {len(unused)} weights that {type(model).__name__} has no place "
            f"for, among them {unused[:LISTED_KEYS]}."
        )
    return model


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig):
    """Raises ValueError where the tokenizer can give ids that the model has no embedding for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} gives ids up to {largest}, but `vocab_size` is "
            f"{config.vocab_size}: take a smaller tokenizer, or set `config_overrides` vocab_size={largest + 1}."
        )
