"""Configurations, weights and tokenizers from a folder or the Hub, refused where they do not fit together."""

import ast
import dataclasses
import functools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import load_state_dict
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.utils import (
    CHAT_TEMPLATE_DIR,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
)

from modeling_spiralformer import SpiralFormerConfig
from modeling_spiralformer.files_spiralformer import (
    MODEL_FILES,
    check_digests,
    checked_files,
    naming_damage,
    read_index,
    read_object,
)
from workshop.files import is_finite

# In the library's order: the first that is there is what it loads.
WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
# One of these is in every folder of a tokenizer, of whichever kind.
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# And these may be beside it.
TOKENIZER_PATTERNS = (*TOKENIZER_FILES, "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
TOKENIZER_PATHS = (*TOKENIZER_PATTERNS, f"{CHAT_TEMPLATE_DIR}/*")  # and in its folder of further templates
# Everything that a model or a run is loaded from, and that SHA256SUMS lists where a command has written the folder.
CHECKPOINT_FILES = (*MODEL_FILES, *TOKENIZER_PATTERNS, OPTIMIZER_NAME, SCHEDULER_NAME, SCALER_NAME, "rng_state*.pth")
CHECKPOINT_FILES += (TRAINER_STATE_NAME, TRAINING_ARGS_NAME)


# -- configurations ---------------------------------------------------------------------------------------------


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
        if key.strip() in settings:
            raise ValueError(
                f"`config_overrides` must set a field once, but got {key.strip()!r} again: {overrides!r}."
            )
        settings[key.strip()] = parse_override(value.strip())
        if not is_finite(settings[key.strip()]):
            raise ValueError(f"`config_overrides` must hold finite numbers, but got {item!r}.")
    return settings


def check_fields(name_or_path: str, config_class: type[SpiralFormerConfig]):
    """Raises ValueError where a configuration holds a misspelt field, or lacks one that every saved one holds."""
    config_dict, _ = config_class.get_config_dict(name_or_path)
    faults = config_class.misspelt_fields(config_dict) + config_class.find_faults(config_dict)
    if faults:
        raise ValueError(f"The config.json of {name_or_path!r} must be as it was saved: {' '.join(faults)}")


def check_source(field: str, name_or_path: str) -> None:
    """
    Raises FileNotFoundError or ValueError, naming the setting, for a path that is no folder of a checkpoint. A name
    that could be one of the Hub is left to the library.
    """
    path = Path(name_or_path)
    if path.is_dir():
        if not (path / CONFIG_NAME).is_file() and find_adapter_config_file(name_or_path) is None:
            raise FileNotFoundError(f"`{field}` must be a folder with {CONFIG_NAME}, but {name_or_path!r} has none.")
    elif path.exists():
        raise ValueError(f"`{field}` must be a folder or a name on the Hub, but {name_or_path!r} is a file.")
    else:
        try:
            validate_repo_id(name_or_path)
        except HFValidationError as error:
            raise FileNotFoundError(
                f"`{field}` must be an existing folder or a name on the Hub, but got {name_or_path!r}."
            ) from error
    # The library would load the base that the adapter names, wherever it is, and none of the weights beside it.
    if find_adapter_config_file(name_or_path) is not None:
        raise ValueError(
            f"`{field}` must be a whole model, but {name_or_path!r} holds an adapter: merge it into its base first "
            "(`PeftModel.from_pretrained(...).merge_and_unload()`)."
        )


def load_config(
    name_or_path: str, overrides: Mapping[str, object] | None = None, field: str = "model_name_or_path"
) -> PreTrainedConfig:
    """
    The configuration of a folder or Hub name, with some fields changed and all of them validated again.

    Raises FileNotFoundError or ValueError, naming the setting `field`, where there is none, and ValueError, naming the
    file, where it is damaged.
    """
    check_source(field, name_or_path)
    if Path(name_or_path).is_dir():
        check_digests(name_or_path, [CONFIG_NAME])
        read_object(Path(name_or_path, CONFIG_NAME))
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except OSError as error:
        if Path(name_or_path).is_dir():  # the error names the file
            raise
        raise FileNotFoundError(
            f"`{field}` must be an existing folder or a name on the Hub, but {name_or_path!r} is no folder here, and: "
            f"{error}"
        ) from error
    if isinstance(config, SpiralFormerConfig):
        check_fields(name_or_path, type(config))
    known = sorted(item.name for item in dataclasses.fields(config))
    for key, value in (overrides or {}).items():
        if key not in known:
            raise ValueError(
                f"`config_overrides` must name fields of {type(config).__name__}, but got {key!r}: {known}."
            )
        if key == "dtype":  # of no effect on the weights
            raise ValueError(f"`config_overrides` must leave `dtype` to `--dtype`, but got {value!r}.")
        setattr(config, key, value)
    config.validate()
    return config


# -- weights ----------------------------------------------------------------------------------------------------


def find(name_or_path: str, file: str) -> Path | None:
    """A file of a folder or a repository on the Hub, downloaded where it is not here yet; None where there is none."""
    return (path := cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False)) and Path(path)


def weight_files(name_or_path: str) -> list[Path]:
    """
    The files that the library loads, none where it will find none.

    Raises ValueError for an index that does not say what it should, where a folder holds further safetensors files of
    a model, which the library would leave alone, and where no file is in the place of one.
    """
    for path in (Path(name_or_path, name) for name in WEIGHT_FILES):
        if os.path.lexists(path) and not path.is_file():
            raise ValueError(
                f"The checkpoint {name_or_path!r} must hold files, but {path.name} is a folder or a link to nothing."
            )
    first = next(filter(None, (find(name_or_path, name) for name in WEIGHT_FILES)), None)
    if first is None or first.suffix != ".json":
        files = [] if first is None else [first]
    else:
        try:
            names = sorted(set(read_index(first).values()))
        except ValueError as error:
            raise ValueError(f"The checkpoint {name_or_path!r} has a damaged {first.name}: {error}") from error
        files = [path for name in names if (path := find(name_or_path, name)) is not None]
    beside = {path.name for path in Path(name_or_path).glob("model*.safetensors")} - {path.name for path in files}
    if beside and first is None:
        raise ValueError(
            f"The checkpoint {name_or_path!r} must hold {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}, but holds "
            f"only {sorted(beside)}."
        )
    if beside and first.name.startswith(SAFE_WEIGHTS_NAME):
        raise ValueError(
            f"The checkpoint {name_or_path!r} must hold one model, but beside {first.name} it holds {sorted(beside)}, "
            "which nothing would load: move one of the two away."
        )
    return files


def saved_dtype(name_or_path: str) -> torch.dtype:
    """The type that takes every weight of a checkpoint as it is. What config.json says may be narrower."""
    saved = (value for file in weight_files(name_or_path) for value in load_state_dict(file, "meta").values())
    return common_dtype(saved)


def common_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The type that takes every floating tensor as it is."""
    floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    return functools.reduce(torch.promote_types, floating) if floating else torch.float32


def check_loaded(name_or_path: str, model: PreTrainedModel, info: Mapping[str, object]) -> None:
    """
    Raises ValueError, naming every tensor, where a model is not what its checkpoint holds.

    Args:
        info: what `from_pretrained` returns with `output_loading_info=True`.
    """
    named = type(model).__name__
    shapes = [f"{name} ({list(saved)} in place of {list(own)})" for name, saved, own in info["mismatched_keys"]]
    faults = [
        (f"lacks {{}} weights that {named} needs in this configuration", info["missing_keys"]),
        (f"holds {{}} weights that {named} has no place for in this configuration", info["unexpected_keys"]),
        ("holds {} weights of other shapes than this configuration needs", shapes),
        ("has {} weights that could not be read", info.get("error_msgs", ())),
    ]
    found = [f"{text.format(len(names))}: {', '.join(sorted(map(str, names)))}" for text, names in faults if names]
    head = model.get_output_embeddings()
    if (
        model.config.tie_word_embeddings
        and head is not None
        and head.weight is not model.get_input_embeddings().weight
    ):
        found.append("holds a head of its own, but `tie_word_embeddings` is True")
    if found:
        raise ValueError(f"The checkpoint {str(name_or_path)!r} {'; it '.join(found)}.")


def load_model(
    name_or_path: str,
    config: PreTrainedConfig,
    model_class: type = AutoModelForCausalLM,
    dtype: torch.dtype | str = torch.float32,
) -> PreTrainedModel:
    """
    A model (by default a causal language model) with the weights of a checkpoint, in `dtype` ("auto": as saved).

    Raises ValueError, naming every tensor, where the checkpoint lacks a weight, which the library would fill with
    random numbers, or holds one that the model has no place for, which it would drop; and where a file is damaged.
    """
    own = isinstance(config, SpiralFormerConfig)  # whose class checks the files itself
    with naming_damage(name_or_path) if own else checked_files(name_or_path):
        weight_files(name_or_path)
        if dtype == "auto" and getattr(config, "quantization_config", None) is None:
            dtype = saved_dtype(name_or_path)
        # Other shapes are refused below, by name.
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = model_class.from_pretrained(name_or_path, config=config, dtype=dtype, **options)
    check_loaded(name_or_path, model, info)
    return model


# -- tokenizers -------------------------------------------------------------------------------------------------


def has_tokenizer(name_or_path: str) -> bool:
    """Whether a folder or a repository on the Hub holds a tokenizer."""
    return any(find(name_or_path, name) for name in TOKENIZER_FILES)


def remove_replaced_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """After a tokenizer was saved into a folder: removes what only an older one had there, such as a chat template."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        saved = {path.relative_to(scratch) for path in Path(scratch).rglob("*")}
    for pattern in TOKENIZER_PATHS:
        for path in Path(folder).glob(pattern):
            if path.is_file() and path.relative_to(folder) not in saved:
                path.unlink()


def load_tokenizer(
    name_or_path: str, config: PreTrainedConfig | None, field: str = "tokenizer_name"
) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a folder or Hub name.

    Raises FileNotFoundError or ValueError, naming the setting `field`, where there is none, where it cannot be read,
    and where it can give ids that the model of a configuration has no embedding for.
    """
    where = f"`{field}` must name a folder or a repository on the Hub with a tokenizer"
    if Path(name_or_path).exists() and not has_tokenizer(name_or_path):
        raise FileNotFoundError(f"{where}, but {name_or_path!r} holds none of {list(TOKENIZER_FILES)}.")
    check_digests(name_or_path, TOKENIZER_PATTERNS)
    present = [name for name in TOKENIZER_FILES if os.path.lexists(Path(name_or_path, name))]
    try:
        for name in present:
            if name.endswith(".json"):
                read_object(Path(name_or_path, name))
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # the library has no error of its own for it: some name neither file nor folder
        read = f" from {', '.join(present)}" if present else ""
        raise ValueError(f"{where}, but that of {name_or_path!r} cannot be read{read}: {error}") from error
    if config is not None:
        check_tokenizer(tokenizer, config)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig):
    """Raises ValueError where the tokenizer can give ids that the model has no embedding for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} gives ids up to {largest}, but `vocab_size` is "
            f"{config.vocab_size}: take a smaller tokenizer, or set `config_overrides` vocab_size={largest + 1}."
        )
