"""A family of layers that is not among ours takes one entry: Qwen2's layers, exact at once, cached and not."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from qwen2 import QWEN2
from support import make_exact, pad_rows, random_ids, small_config, small_model
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, StaticCache

from modeling_spiralformer.layers_spiralformer import FAMILIES

FIELDS = {"layer_family": "qwen2", "num_key_value_heads": 1, "rope_parameters": {"rope_theta": 500.0}}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(FAMILIES, "qwen2", QWEN2)


def test_an_empty_schedule_is_the_library_model():
    model = small_model(**FIELDS, chunk_sizes=[], num_core_layers=0, scale_embeddings=False)
    config = model.config
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "rope_parameters")
    shared += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings")
    theirs = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=2, **{name: getattr(config, name) for name in shared}))
    weights = {
        name.replace("prelude.0", "layers.0").replace("coda.0", "layers.1"): weight
        for name, weight in model.state_dict().items()
    }
    make_exact(theirs).eval().load_state_dict(weights)
    ids = random_ids(2, 19)
    with torch.no_grad():
        assert (model(ids).logits - theirs(ids).logits).abs().max() < 1e-9


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_gives_what_one_forward_gives(kind):
    model = small_model(**FIELDS)
    ids, mask = pad_rows([random_ids(1, length)[0] for length in (31, 17, 24)], "left")
    config = model.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=31)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        parts, seen = [], 0
        for part in ids.split([15, 1, 1, 3, *[1] * 11], dim=1):
            seen += part.shape[1]
            parts.append(model(part, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    assert ((torch.cat(parts, dim=1) - whole) * mask[..., None]).abs().max() < 1e-9
    assert cache.layers[0].keys.shape[1] == cache.layers[1].keys.shape[1] == 1


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias", "hidden_dropout", "use_parallel_residual"])
def test_fields_that_its_configuration_lacks_are_refused(field):
    assert getattr(small_config(**FIELDS), field) is None
    value = 0.1 if "dropout" in field else True
    with pytest.raises(StrictDataclassError, match=f'`{field}` must be None with layer_family "qwen2"'):
        small_config(**FIELDS, **{field: value})
