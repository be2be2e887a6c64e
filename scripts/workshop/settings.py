"""Settings, from a file too, held to the types and ranges of the data classes that they are for."""

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator

from modeling_spiralformer.files_spiralformer import unique
from workshop.files import is_finite, read_text

WORDS = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
WORDS |= {list: "a list", dict: "a mapping"}


LARGEST_SEED = 2**32 - 1  # NumPy's


class UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings name each key once: of two the last would count, and nobody would be told."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_settings(field: str, path: str | Path) -> dict[str, Any]:
    """
    The mapping that a .yaml, .yml or .json file holds.

    Raises ValueError, naming the file, where it is no such mapping in UTF-8, and for a key that stands there twice.
    """
    text = read_text(field, path)
    try:
        # What is JSON is YAML, but for numbers such as 1e-3, which YAML reads as text.
        entries = (
            json.loads(text, object_pairs_hook=unique) if Path(path).suffix == ".json" else yaml.load(text, UniqueKeys)
        )
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"`{field}` must be a file of {Path(path).suffix[1:]}, but {str(path)!r} is not: {error}"
        ) from error
    if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
        raise ValueError(f'`{field}` must hold settings, "name: value" each, but {str(path)!r} holds {entries!r}.')
    return entries


def alternatives(hint: Any) -> tuple:
    """The types of a union; a type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def enums(hint: Any) -> list[type[Enum]]:
    """The enumerations of a union, such as those of which the library also takes the text."""
    return [kind for kind in alternatives(hint) if isinstance(kind, type) and issubclass(kind, Enum)]


def describe(hint: Any) -> str:
    """What a type allows, in words."""
    if enums(hint):
        return f"one of {[item.value for enum in enums(hint) for item in enum]}"
    words = []
    for kind in alternatives(hint):
        word = WORDS.get(get_origin(kind) or kind, str(kind))
        inner = get_args(kind)[-1] if get_origin(kind) in (list, dict) else Any
        words.append(word if inner is Any else f"{word} that holds {describe(inner)} in each place")
    return " or ".join(words)


def convert(value: Any, hint: Any) -> Any:
    """A value as its type has it where that is a number: from an integer, and from 6e-4, which YAML reads as text."""
    kinds = alternatives(hint)
    if float in kinds and (type(value) is int and int not in kinds or type(value) is str and str not in kinds):
        return float(value)
    return value


def check_types(entries: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> dict[str, Any]:
    """
    The entries, each converted to the type of its name in `kinds`; names without a type stay as they are.

    Raises ValueError, naming the key, what came and what is allowed, for a value of another type.
    """
    checked = {}
    for name, value in entries.items():
        hint = kinds.get(name, Any)
        try:
            checked[name] = convert(value, hint)
            type_validator(name, checked[name], hint)
            for enum in enums(hint):
                enum(checked[name])
        except (TypeError, ValueError) as error:
            quote = ". YAML reads a bare yes, no, on or off as true or false: quote it" if type(value) is bool else ""
            raise ValueError(f"`{name}` must be {describe(hint)}, but {where} has {value!r}{quote}.") from error
    return checked


def types_of(*classes: type) -> dict[str, Any]:
    """Name -> type of the settings of data classes."""
    return {name: hint for data_class in classes for name, hint in get_type_hints(data_class).items()}


# -- ranges -------------------------------------------------------------------------------------------------------


def check_counts(settings: object, *names: str, least: int = 1) -> None:
    """Raises ValueError where a named setting, or one of a list, is below the least count; None is not set."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, list):
            if not value or min(value) < least:
                raise ValueError(f"`{name}` must be one or more integers >= {least}, but got {value}.")
        elif value is not None and value < least:
            raise ValueError(f"`{name}` must be an integer >= {least}, but got {value}.")


def check_left_out(settings: object, by: str, *kept: str) -> None:
    """Refuses a value other than the default of every setting but these, since `by` is given and it has no effect."""
    for item in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, item.name)
        if item.name not in (by, *kept) and value != item.default:
            raise ValueError(f"`{item.name}` must be left out with `{by}`, but got {value!r}.")


def check_numbers(settings: object, **ranges: tuple[float, float]) -> None:
    """
    Raises ValueError where a number of a data class is not finite, or a named one is outside of its range, whose ends
    are allowed; one that is None is not set.
    """
    for item in dataclasses.fields(settings):
        value = getattr(settings, item.name)
        if not is_finite(value):
            raise ValueError(f"`{item.name}` must be finite, but got {value}.")
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            bounds = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
            raise ValueError(f"`{name}` must be {bounds}, but got {value}.")
