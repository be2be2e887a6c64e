"""The published models: parameters to the paper's rounding, FLOPs within 1.5%, files equal to what writes them."""

from pathlib import Path

import pytest

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM, configuration_folder
from workshop.costs import count_parameters
from workshop.published import (
    HYPERLOOP_MODELS,
    PUBLISHED_MODELS,
    SMOLLM_MODELS,
    all_configs,
    hyperloop_config,
    hyperloop_row,
    measure,
    published_config,
    smollm_row,
    table_row,
    to_json,
)


@pytest.mark.parametrize("model", PUBLISHED_MODELS, ids=lambda model: model.name)
def test_parameters_and_flops_of_table_1(model):
    measured = measure(published_config(model))
    assert round(measured.non_embedding / 1e6, 1) == pytest.approx(model.non_embedding, abs=1e-9)
    assert measured.flops / 1e12 == pytest.approx(model.teraflops, rel=0.015)
    assert table_row(model, measured)[0] == model.name


@pytest.mark.parametrize("model", HYPERLOOP_MODELS, ids=lambda model: model.name)
def test_parameters_of_hyperloop(model):
    """To the paper's rounding, which is that of a model without its input embedding."""
    config = hyperloop_config(model)
    total, _ = count_parameters(config)
    assert round((total - config.vocab_size * config.hidden_size) / 1e6, 1) == model.parameters
    assert config.intermediate_size == 2.75 * config.hidden_size and not config.tie_word_embeddings
    assert config.num_key_value_heads == config.num_attention_heads == 16 and config.norm == "rms_norm"
    assert not config.attention_bias and not config.mlp_bias and config.rope_parameters["rope_theta"] == 1e4
    name, layers, _, counted, published, _ = hyperloop_row(model)
    assert (name, counted) == (model.name, published)
    assert layers == "{}+{}x{{1,1,1}}+{}".format(*model.layers)


def test_rows_of_smollm():
    """The paper's count of the smaller model is exact, that of the larger one is in thousands."""
    small, large = (smollm_row(model) for model in SMOLLM_MODELS)
    assert small[:4] == ("smollm-53k", "0+1x{1,1,1,1,1,1,1,1}+0", "53,760", "53,760")
    assert large[:3] == ("smollm-206k", "0+1x{1,1,1,1,1,1,1,1}+0", "205,952")
    assert round(205_952, -3) == SMOLLM_MODELS[1].parameters


def test_files_are_what_the_script_writes():
    configs = all_configs()
    assert len(configs) == 32 == len(list(Path("configuration").iterdir()))
    for name, config in configs.items():
        assert Path("configuration", name, "config.json").read_text() == to_json(config), name
        assert SpiralFormerConfig.from_pretrained(configuration_folder(name)).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", ["tiny2", "configuration/tiny", "../tokenization", "", Path("tiny")])
def test_a_name_that_is_none_of_them_is_refused(name):
    with pytest.raises(
        ValueError, match=r"`name` must be one of \[.*'spiralformer-b-mesh-160m', .*'tiny', 'tiny-llama'\], but got"
    ):
        configuration_folder(name)


@pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
def test_tiny_has_about_a_million_parameters(name):
    config = SpiralFormerConfig.from_pretrained(configuration_folder(name))
    assert 0.8e6 < SpiralFormerForCausalLM(config).num_parameters() < 1.2e6
