"""SMolLM (arXiv 2605.06322), one layer run eight times: our configuration beside the paper's model, written out."""

import pytest
import torch
from support import make_exact, seeded
from torch.nn.functional import layer_norm, silu
from transformers import AutoConfig, AutoTokenizer, DynamicCache

from modeling_spiralformer import TOKENIZER_FOLDER, SpiralFormerForCausalLM, configuration_folder

EPSILON = 1e-5


def model_of(name: str, **options) -> SpiralFormerForCausalLM:
    """The published configuration with weights and biases of std 0.15, in float64."""
    model = SpiralFormerForCausalLM(AutoConfig.from_pretrained(configuration_folder(name), **options))
    generator = seeded(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return make_exact(model).eval()


def turned(heads: torch.Tensor) -> torch.Tensor:
    """Rotary positions of heads (length, H, E): dims i and i + E / 2 of position p turn by p / 10000^(2 i / E)."""
    length, _, size = heads.shape
    rates = 1e4 ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * rates  # in float32, as the library has them
    cosine, sine = angles.cos().double()[:, None], angles.sin().double()[:, None]
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def smollm(weights: dict[str, torch.Tensor], ids: torch.Tensor, heads: int) -> torch.Tensor:
    """Logits (length, vocabulary) of one molecule: embedding, one block eight times, norm, the embedding again."""
    block = {name.removeprefix("model.core.0."): weight for name, weight in weights.items() if ".core." in name}
    embedding = weights["model.embed_tokens.weight"]
    x = embedding[ids]
    length, size = x.shape
    for _ in range(8):
        y = layer_norm(x, (size,), block["input_layernorm.weight"], block["input_layernorm.bias"], EPSILON)
        q, k, v = (y @ block[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        q, k, v = (part.view(length, heads, -1) for part in (q, k, v))
        q, k = turned(q), turned(k)
        joined = torch.zeros(length, size, dtype=torch.float64)
        for position in range(length):
            seen = slice(0, position + 1)
            for head in range(heads):
                scores = k[seen, head] @ q[position, head] / (size // heads) ** 0.5
                values = scores.softmax(dim=0) @ v[seen, head]
                joined[position, head * size // heads : (head + 1) * size // heads] = values
        x = x + joined @ block["self_attn.o_proj.weight"].T
        y = layer_norm(
            x, (size,), block["post_attention_layernorm.weight"], block["post_attention_layernorm.bias"], EPSILON
        )
        gate, up = (y @ block[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (silu(gate) * up) @ block["mlp.down_proj.weight"].T
    return layer_norm(x, (size,), weights["model.norm.weight"], weights["model.norm.bias"], EPSILON) @ embedding.T


@pytest.mark.parametrize("name", ["smollm-53k", "smollm-206k"])
@torch.no_grad()
def test_logits_are_those_of_the_model_written_out(name):
    model = model_of(name)
    ids = torch.randint(3, 68, (11,), generator=seeded(1))
    expected = smollm(model.state_dict(), ids, model.config.num_attention_heads)
    assert (model(ids[None]).logits[0] - expected).abs().max() < 1e-9
    cache = DynamicCache(config=model.config)
    parts = [model(part[None], past_key_values=cache).logits[0] for part in ids.split([4, 1, 6])]
    assert (torch.cat(parts) - expected).abs().max() < 1e-9


@pytest.mark.parametrize(("name", "count"), [("smollm-53k", 53_760), ("smollm-206k", 205_952)])
def test_parameters_are_those_of_the_paper_and_start_alike(name, count):
    torch.manual_seed(0)
    model = SpiralFormerForCausalLM(AutoConfig.from_pretrained(configuration_folder(name)))
    assert model.num_parameters() == count
    assert set(model.state_dict()) - {"lm_head.weight"} == {
        *("model.embed_tokens.weight", "model.norm.weight", "model.norm.bias"),
        *(
            f"model.core.0.{norm}_layernorm.{kind}"
            for norm in ("input", "post_attention")
            for kind in ("weight", "bias")
        ),
        *(f"model.core.0.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"model.core.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }  # one layer; no other bias, no router, scorer, or vector of a pass
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name


def test_dropout_is_on_embedding_attention_and_both_outputs():
    """In training each drops a tenth, and scales what stays; in evaluation nothing is dropped."""
    model = model_of("smollm-53k", hidden_dropout=0.1, attention_dropout=0.0)
    without = model_of("smollm-53k", hidden_dropout=0.0, attention_dropout=0.0)
    layer, plain = model.model.core[0], without.model.core[0]
    states = torch.randn(4, 100, 64, generator=seeded(1), dtype=torch.float64)
    torch.manual_seed(0)
    for mine, theirs in ((layer.mlp, plain.mlp), (model.model.emb_dropout, without.model.emb_dropout)):
        assert torch.equal(mine(states), theirs(states))
        found, expected = mine.train()(states), theirs(states)
        kept = found != 0
        assert kept.double().mean().item() == pytest.approx(0.9, abs=0.01)
        assert torch.allclose(found[kept], expected[kept] / 0.9, rtol=1e-12)
    positions = model.model.rotary_emb(states, position_ids=torch.arange(100)[None])
    options = {"position_embeddings": positions, "attention_mask": None}
    assert torch.equal(layer.self_attn(states, **options)[0], plain.self_attn(states, **options)[0])
    found, expected = layer.self_attn.train()(states, **options)[0], plain.self_attn(states, **options)[0]
    kept = found != 0
    assert kept.double().mean().item() == pytest.approx(0.9, abs=0.01)
    assert torch.allclose(found[kept], expected[kept] / 0.9, rtol=1e-12)


def test_the_configuration_says_what_the_paper_says():
    config = AutoConfig.from_pretrained(configuration_folder("smollm-53k"))
    assert config.attention_dropout == config.hidden_dropout == 0.1 and config.max_position_embeddings == 128
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_FOLDER / "smiles")
    assert len(tokenizer) == 65 and config.vocab_size == 68  # the paper counts three more in its spelling of the data
