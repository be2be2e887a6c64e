"""What a conversion is worth: the sources and starts that `compare_starts.py` compares."""

import pytest
import torch
from datasets import Dataset
from support import VOCAB
from test_conversion import neox_model

import compare_starts
from modeling_spiralformer.layers_spiralformer import FAMILIES
from workshop import starts
from workshop.corpus import SPLITS, standard_library_root

TRAINED_ON = [
    "argparse",
    "ast",
    "calendar",
    "codecs",
    "copy",
    "datetime",
    "difflib",
    "functools",
    "inspect",
    "ipaddress",
    "locale",
    "optparse",
    "pdb",
    "pickle",
    "random",
    "socket",
    "statistics",
    "tarfile",
    "threading",
    "typing",
]
HELD_OUT = ["shutil", "subprocess", "tempfile"]


def library_text(names: list[str], path) -> str:
    path.write_text("\n".join((standard_library_root() / f"{name}.py").read_text() for name in names))
    return str(path)


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3"])
def test_a_converted_model_starts_and_stays_ahead_of_a_random_one(family, tmp_path):
    (losses,) = compare_starts.main(
        starts.ComparisonArguments(
            layer_family=family,
            hidden_size=32,
            num_hidden_layers=6,
            config_overrides="num_prelude_layers=1,num_core_layers=2,num_coda_layers=1,chunk_sizes=[4,2,1]",
            source_steps=60,
            source_learning_rate=1e-2,
            max_steps=20,
            learning_rate=1e-3,
            block_size=64,
            max_eval_samples=32,
            train_file=library_text(TRAINED_ON, tmp_path / "train.txt"),
            validation_file=library_text(HELD_OUT, tmp_path / "validation.txt"),
            starts=["converted", "random"],
            seeds=[0],
        )
    )
    source, converted, random = (losses[name] for name in ("source", "converted", "random"))
    gained = random[0] - source[0]
    assert gained > 1, "the source has learnt too little for a comparison"
    assert converted[0] - source[0] < 0.2 * gained
    assert converted[1] < converted[0] and random[1] - converted[1] > 0.5 * gained
    assert list(losses) == ["source", "converted", "random"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_source_of_a_comparison_has_the_layers_that_are_asked_for(family):
    source = starts.new_source(starts.ComparisonArguments(layer_family=family), VOCAB)
    assert type(source.config) is FAMILIES[family].config_class
    matrices = [weight for name, weight in source.named_parameters() if ".mlp." in name and weight.dim() == 2]
    size = sum(weight.numel() for weight in matrices) / source.config.num_hidden_layers
    assert abs(size / (8 * 64**2) - 1) < 0.01  # an MLP of GPT-NeoX, at this width
    converted = starts.starts(source, {"num_core_layers": 2, "chunk_sizes": [4, 1]})["converted"]()
    assert converted.config.layer_family == family
    if family != "gpt_neox":
        assert (converted.config.num_key_value_heads, converted.config.head_dim) == (2, 16)


def test_a_family_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="`layer_family` must be one of .'gpt_neox', 'llama', 'qwen3'.*got 'mamba'"):
        starts.ComparisonArguments(layer_family="mamba")


def test_every_start_can_be_made_and_an_unknown_one_is_refused_before_training(monkeypatch):
    arguments = starts.ComparisonArguments(starts=["upside down"])
    source = neox_model(num_hidden_layers=8)
    options = {"num_prelude_layers": 1, "num_core_layers": 3, "num_coda_layers": 1, "chunk_sizes": [4, 1]}
    makers = starts.starts(source, options)
    cores = {name: make().model.core[1].mlp.dense_h_to_4h.weight for name, make in makers.items()}
    layers = [layer.mlp.dense_h_to_4h.weight for layer in source.gpt_neox.layers]
    assert torch.equal(cores["converted"], layers[3]) and torch.equal(cores["core from the first layers"], layers[2])
    assert torch.equal(cores["core from the last layers"], layers[5])
    assert torch.allclose(cores["core from means of neighbours"], (layers[3] + layers[4]) / 2)
    assert makers["anchor"]().config.topology == "anchor"
    for bias in (0, 4, 8):
        routers = makers[f"router_bias {bias}"]().model.topology.read
        assert all(abs(router.bias.max() - bias) < 0.2 for router in routers)
    assert not any(torch.equal(cores["random"].double(), layer) for layer in layers)
    blocks = {split: Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]}) for split in SPLITS}
    monkeypatch.setattr(starts, "make_trainer", lambda *_, **__: pytest.fail("the source is trained"))
    with pytest.raises(ValueError, match="starts.*converted.*upside down"):
        starts.compare(arguments, 0, blocks, VOCAB)
    plain = starts.ComparisonArguments(config_overrides="chunk_sizes=[]")
    with pytest.raises(ValueError, match=r"`chunk_sizes` must be at least one chunk size.*\[\]"):
        starts.compare(plain, 0, blocks, VOCAB)
    one_topology = starts.ComparisonArguments(config_overrides="topology=anchor")  # which has no routers
    with pytest.raises(ValueError, match="router_bias"):
        starts.compare(one_topology, 0, blocks, VOCAB)
