"""SpiralFormer for Hugging Face Transformers (arXiv 2602.11698). Importing this package registers its classes."""

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from .cache_spiralformer import SpiralFormerQuantizedCache
from .configuration_spiralformer import SpiralFormerConfig
from .modeling_spiralformer import (
    AUTO_CLASSES,
    SpiralFormerForCausalLM,
    SpiralFormerForQuestionAnswering,
    SpiralFormerForSequenceClassification,
    SpiralFormerForTokenClassification,
    SpiralFormerModel,
    SpiralFormerPreTrainedModel,
)
from .published import TOKENIZER_FOLDER, configuration_folder

AutoConfig.register(SpiralFormerConfig.model_type, SpiralFormerConfig, exist_ok=True)
AutoTokenizer.register(SpiralFormerConfig, tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
for auto_class, model_class in AUTO_CLASSES.items():
    getattr(transformers, auto_class).register(SpiralFormerConfig, model_class, exist_ok=True)
# A saved configuration brings the code along. The models do not: FSDP makes classes of them that no file holds.
SpiralFormerConfig.register_for_auto_class()

__all__ = [
    "TOKENIZER_FOLDER",
    "SpiralFormerConfig",
    "SpiralFormerForCausalLM",
    "SpiralFormerForQuestionAnswering",
    "SpiralFormerForSequenceClassification",
    "SpiralFormerForTokenClassification",
    "SpiralFormerModel",
    "SpiralFormerPreTrainedModel",
    "SpiralFormerQuantizedCache",
    "configuration_folder",
]
