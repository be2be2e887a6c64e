"""The published models: parameters to the paper's rounding, FLOPs within 1.5%, files equal to what writes them."""

from pathlib import Path

import pytest

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM, configuration_folder
from workshop.published import PUBLISHED_MODELS, all_configs, measure, published_config, table_row, to_json


@pytest.mark.parametrize("model", PUBLISHED_MODELS, ids=lambda model: model.name)
def test_parameters_and_flops_of_table_1(model):
    measured = measure(published_config(model))
    assert round(measured.non_embedding / 1e6, 1) == pytest.approx(model.non_embedding, abs=1e-9)
    assert measured.flops / 1e12 == pytest.approx(model.teraflops, rel=0.015)
    assert table_row(model, measured)[0] == model.name


def test_files_are_what_the_script_writes():
    configs = all_configs()
    assert len(configs) == 24 == len(list(Path("configuration").iterdir()))
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
