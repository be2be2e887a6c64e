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
"""What the releases of transformers call the cache: `past_key_values` up to 5.23, `cache` from 5.24 on.

The code says `cache`, whatever the release. Arguments may have either name; outputs, and calls into the library, have
the release's own. The day 5.23 is dropped this file goes, and `**{CACHE_NAME: cache}` becomes `cache=cache`.
"""

import functools
from collections.abc import Callable

from transformers.modeling_outputs import BaseModelOutputWithPast

OLD_NAME, NEW_NAME = "past_key_values", "cache"
CACHE_NAME = NEW_NAME if NEW_NAME in BaseModelOutputWithPast.__dataclass_fields__ else OLD_NAME
# Up to 5.23 a checkpointed layer in training mode drops its cache even where no gradients are recorded.
CHECKPOINTED_LAYERS_KEEP_CACHE = CACHE_NAME == NEW_NAME
# Up to 5.23 eager attention looks up the pages of continuous batching itself, by the number of its layer.
EAGER_READS_PAGES = CACHE_NAME == OLD_NAME
# In error messages, which a reader of either release understands.
CACHE_ARGUMENT = f"`{OLD_NAME}` (`{NEW_NAME}` since transformers 5.24)"


def takes_either_cache_name(name: str) -> Callable[[Callable], Callable]:
    """Lets a function, whose own argument is called `name`, take the cache under the old and under the new name.

    Raises:
        `ValueError`: where two different caches are given.
    """
    other = OLD_NAME if name == NEW_NAME else NEW_NAME

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def renamed(*args, **kwargs):
            if other in kwargs:
                given = [cache for cache in (kwargs.pop(other), kwargs.pop(name, None)) if cache is not None]
                if len(given) > 1 and given[0] is not given[1]:
                    raise ValueError(f"{CACHE_ARGUMENT} must be given once, but got two caches.")
                if given:
                    kwargs[name] = given[0]
            return function(*args, **kwargs)

        return renamed

    return decorate


__all__ = [
    "CACHE_ARGUMENT",
    "CACHE_NAME",
    "CHECKPOINTED_LAYERS_KEEP_CACHE",
    "EAGER_READS_PAGES",
    "takes_either_cache_name",
]
