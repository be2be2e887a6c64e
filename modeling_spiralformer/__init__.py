"""SpiralFormer for Hugging Face Transformers (arXiv 2602.11698). Importing this package registers its classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from .configuration_spiralformer import SpiralFormerConfig
from .modeling_spiralformer import (
    SpiralFormerForCausalLM,
    SpiralFormerForQuestionAnswering,
    SpiralFormerForSequenceClassification,
    SpiralFormerForTokenClassification,
    SpiralFormerModel,
    SpiralFormerPreTrainedModel,
)

AutoConfig.register(SpiralFormerConfig.model_type, SpiralFormerConfig, exist_ok=True)
AutoTokenizer.register(SpiralFormerConfig, tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
for auto_class, model_class in (
    (AutoModel, SpiralFormerModel),
    (AutoModelForCausalLM, SpiralFormerForCausalLM),
    (AutoModelForQuestionAnswering, SpiralFormerForQuestionAnswering),
    (AutoModelForSequenceClassification, SpiralFormerForSequenceClassification),
    (AutoModelForTokenClassification, SpiralFormerForTokenClassification),
):
    auto_class.register(SpiralFormerConfig, model_class, exist_ok=True)

__all__ = [
    "SpiralFormerConfig",
    "SpiralFormerForCausalLM",
    "SpiralFormerForQuestionAnswering",
    "SpiralFormerForSequenceClassification",
    "SpiralFormerForTokenClassification",
    "SpiralFormerModel",
    "SpiralFormerPreTrainedModel",
]
