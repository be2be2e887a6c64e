"""transformers' own tests of a model, on SpiralFormers of every family of layers and topology: `make test-library`.

It is copied beside `test_modeling_common.py` of transformers' source distribution, which lacks the tests of generate()
and of export: those are not here. What is skipped says why.
"""

import unittest

from transformers.testing_utils import torch_device

from modeling_spiralformer import (
    SpiralFormerConfig,
    SpiralFormerForCausalLM,
    SpiralFormerForQuestionAnswering,
    SpiralFormerForSequenceClassification,
    SpiralFormerForTokenClassification,
    SpiralFormerModel,
)

from . import test_modeling_common as library
from .test_training_mixin import TrainingTesterMixin


def set_epsilons(config: SpiralFormerConfig):
    """As the library's function, which also sets the epsilon of norms that a model has not: that is refused."""
    for name in ("layer_norm_eps", "rms_norm_eps"):
        if getattr(config, name) is not None:
            setattr(config, name, 1.0)


def set_rope(config: SpiralFormerConfig, parameters: dict, set_parameters=library._set_config_rope_params) -> bool:
    """As the library's function, with `original_max_position_embeddings` for yarn alone: it is refused elsewhere."""
    parameters = {key: value for key, value in parameters.items() if key != "original_max_position_embeddings"}
    if parameters["rope_type"] == "yarn":
        parameters["original_max_position_embeddings"] = 16384
    return set_parameters(config, parameters)


library.set_config_for_less_flaky_test = set_epsilons
library._set_config_rope_params = set_rope


class Tester:
    """A small model, and rows of it, as the library's tests ask for them."""

    batch_size, seq_length, hidden_size, num_attention_heads, is_training = 4, 7, 32, 4, True
    causal_lm_class = SpiralFormerForCausalLM

    def __init__(self, options: dict):
        self.options = options
        self.num_hidden_layers = self.get_config().num_hidden_layers

    def get_config(self) -> SpiralFormerConfig:
        sizes = {"hidden_size": self.hidden_size, "num_attention_heads": self.num_attention_heads}
        sizes |= {"vocab_size": 99, "intermediate_size": 48, "max_position_embeddings": 512}
        layers = {"num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return SpiralFormerConfig(**{**sizes, **layers, **tokens, **self.options})

    def prepare_config_and_inputs_for_common(self) -> tuple[SpiralFormerConfig, dict]:
        ids = library.ids_tensor([self.batch_size, self.seq_length], 99)
        right_padded = library.torch.ones_like(ids).tril().to(torch_device)
        return self.get_config(), {"input_ids": ids, "attention_mask": right_padded}


class SpiralFormerTest(library.ModelTesterMixin, TrainingTesterMixin, unittest.TestCase):
    """The paper's model; its subclasses name what they change."""

    options: dict = {"chunk_sizes": [4, 2, 1]}
    model_tester = None
    all_model_classes = (
        SpiralFormerModel,
        SpiralFormerForCausalLM,
        SpiralFormerForSequenceClassification,
        SpiralFormerForTokenClassification,
        SpiralFormerForQuestionAnswering,
    )

    def setUp(self):
        self.model_tester = Tester(self.options)

    @unittest.skip("the source distribution has no tests of generate()")
    def test_generation_tester_mixin_inheritance(self):
        pass

    @unittest.skip("a model of one layer in each part runs the core's once for every iteration: more than two in all")
    def test_num_layers_is_small(self):
        pass

    @unittest.skip("`past_key_values` is no name of the past here: either name is taken, with every release")
    def test_bc_cache_name_forward(self):
        pass

    @unittest.skip("rope_type 'dynamic' is refused: what is in the cache was rotated by other frequencies")
    def test_model_rope_scaling_from_config_1_dynamic(self):
        pass

    @unittest.skip("as above: the frequencies of all types are looked at in one test")
    def test_model_rope_scaling_frequencies(self):
        pass


class LlamaTest(SpiralFormerTest):
    options = {"chunk_sizes": [2, 1], "topology": "anchor", "layer_family": "llama", "num_key_value_heads": 2}

    @unittest.skip("rotations of a part of a head are refused: the library's Llama layers have none")
    def test_model_rope_with_partial_rotation(self):
        pass


class Qwen3Test(SpiralFormerTest):
    options = {"chunk_sizes": [8, 1], "layer_family": "qwen3", "num_key_value_heads": 2, "head_dim": 6}

    @unittest.skip("rotations of a part of a head are refused: the library's Qwen3 layers have none")
    def test_model_rope_with_partial_rotation(self):
        pass


class HyperConnectionsTest(SpiralFormerTest):
    options = {"chunk_sizes": [4, 2, 1], "topology": "hyper_connections"}


class PlainTest(SpiralFormerTest):
    options = {"chunk_sizes": [], "num_core_layers": 0}
