"""Probes: metrics against values by hand, collection against the reference, the script, and the page's command."""

import json
import math
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from documents import ROOT, commands, run
from support import large_weights, random_ids, small_config, small_model
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

import probe
from modeling_spiralformer import SpiralFormerForCausalLM
from workshop.probes import measures
from workshop.probes import pictures as plot_probes
from workshop.probes.measures import (
    ENTROPY,
    LOCAL_MASS,
    METRICS,
    choose_molecules,
    collect,
    cut_text,
    dynamic_heads,
    eager_evaluation,
    key_marginal_entropy,
    local_attention_mass,
    local_window,
    measure,
    recorded,
    relative_update,
    uniform_attention,
)
from workshop.probes.routers import coefficients, router_entropy
from workshop.tables import format_resolution

TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "tokenization")
TEXT = "".join(f"def function_{i}(value):\n    return value + {i}\n" for i in range(200))

# -- metrics ----------------------------------------------------------------------------------------------------------


def to_key(keys: list[int]) -> torch.Tensor:
    """Attention in which query q attends to `keys[q]` alone."""
    return torch.nn.functional.one_hot(torch.tensor(keys), len(keys)).double()


@pytest.mark.parametrize(
    "attention, entropy",
    [
        pytest.param(to_key([0, 1, 2, 3, 4]), 1.0, id="every key once: uniform marginal"),
        pytest.param(to_key([0, 0, 0, 0, 0]), 0.0, id="all on the first key"),
        pytest.param(to_key([0, 0, 1, 2]), 0.75, id="previous key: marginal 1/2, 1/4, 1/4, 0"),
        pytest.param(uniform_attention(2).double(), -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)), id="uniform"),
        pytest.param(3 * to_key([0, 1, 2]), 1.0, id="the marginal is normalised"),
    ],
)
def test_entropy_of_the_key_marginal(attention, entropy):
    assert key_marginal_entropy(attention).item() == pytest.approx(entropy, abs=1e-12)


@pytest.mark.parametrize(
    "attention, window, mass",
    [
        pytest.param(to_key([0, 1, 2, 3]), 3, 0.0, id="the query itself is not counted"),
        pytest.param(to_key([0, 0, 1, 2]), 1, 3 / 4, id="previous key"),
        pytest.param(to_key([0, 0, 0, 0, 0]), 2, 2 / 5, id="first key: inside the window of queries 1 and 2"),
        pytest.param(to_key([0, 0, 0, 0, 0]), 5, 4 / 5, id="window as large as the context"),
        pytest.param(to_key([0, 0, 0, 0, 0]), 99, 4 / 5, id="window larger than the context"),
        pytest.param(uniform_attention(4).double(), 1, (1 / 2 + 1 / 3 + 1 / 4) / 4, id="uniform, one key"),
        pytest.param(uniform_attention(4).double(), 9, (1 / 2 + 2 / 3 + 3 / 4) / 4, id="uniform, all keys before"),
    ],
)
def test_local_attention_mass(attention, window, mass):
    assert local_attention_mass(attention, window).item() == pytest.approx(mass, abs=1e-7)


def test_metrics_take_leading_dimensions():
    attention = torch.stack([to_key([0, 1, 2]), to_key([0, 0, 0]), to_key([0, 0, 1])])[:, None].repeat(1, 2, 1, 1)
    entropies, masses = key_marginal_entropy(attention), local_attention_mass(attention, 1)
    assert entropies.shape == masses.shape == (3, 2)
    assert entropies[:2, 1].tolist() == pytest.approx([1.0, 0.0]) and 0 < entropies[2, 0] < 1
    assert masses[:, 0].tolist() == pytest.approx([0, 1 / 3, 2 / 3])


def test_uniform_attention_is_causal_and_sums_to_one():
    expected = [[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]]
    assert torch.allclose(uniform_attention(3), torch.tensor(expected))


def test_one_key_has_no_entropy():
    with pytest.raises(ValueError, match="`attention` must have two keys or more, but got 1: give a longer text"):
        key_marginal_entropy(torch.ones(2, 4, 1, 1))


def test_the_window_is_32_tokens_in_latents_rounded_up():
    assert [local_window(size) for size in (1, 2, 3, 8, 32, 64)] == [32, 16, 11, 4, 1, 1]
    assert [local_window(size, 9) for size in (1, 2, 4, 8, 16)] == [9, 5, 3, 2, 1]


def test_dynamic_heads_have_the_largest_range():
    values = torch.zeros(3, 2, 3)  # ranges by hand: (0, 1) 0.9, (1, 2) 0.5, (1, 0) 0.4, the others less
    values[:, 0, 1] = torch.tensor([0.0, 0.9, 0.2])
    values[:, 1, 2] = torch.tensor([0.9, 0.4, 0.5])
    values[:, 1, 0] = torch.tensor([0.3, 0.3, 0.7])
    values[:, 0, 0] = 1.0  # large, but it does not move
    assert dynamic_heads(values) == [(0, 1), (1, 2), (1, 0)]  # ceil(0.4 * 6)


@pytest.mark.parametrize("layers, heads, count", [(1, 1, 1), (1, 2, 1), (1, 5, 2), (2, 4, 4), (8, 16, 52)])
def test_of_equal_ranges_the_first_heads_are_dynamic(layers, heads, count):
    every = [(layer, head) for layer in range(layers) for head in range(heads)]
    assert dynamic_heads(torch.ones(4, layers, heads)) == every[:count]


def test_relative_update_by_hand():
    before = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[0.0, 0.0], [1.0, 0.0]]])
    after = torch.tensor([[[3.0, 9.0], [0.0, 2.0]], [[7.0, 7.0], [0.0, 0.0]]])
    # 5 / 5 and 0 / 2; a state of zero, which is left out, and 1 / 1.
    assert relative_update(before, after).tolist() == [0.5, 1.0]


# -- collection -------------------------------------------------------------------------------------------------------

OPTIONS = [
    {"topology": "mesh"},
    {"topology": "anchor"},
    {"topology": "residual", "scale_embeddings": False},
    {"topology": "base"},  # zeros where the shift has moved the updates away
    {"topology": "mesh", "share_core": False},
    {"topology": "hyper_connections", "num_streams": 3},
    {"topology": "anchor", "chunk_offsets": [0, 1, 0], "causal_shifts": [4, 5, 0]},
]


def reference_updates(model, ids: list[int]) -> dict[str, float]:
    """Relative update of every block of one text, from the equations, token by token."""
    config, weights = model.config, model.state_dict()
    scale = math.sqrt(config.hidden_size) if config.scale_embeddings else 1.0
    x = [scale * weights["model.embed_tokens.weight"][token] for token in ids]
    v = reference.run_layers(config, weights, "model.prelude", range(config.num_prelude_layers), x)
    memory, h = [x] + [[torch.zeros_like(state) for state in x]] * 5, v  # T + 3 = 6 slots
    if config.topology == "mesh":
        memory, h = reference.run_mesh_cycle(weights, 0, memory, new=v, entered=x)
    streams = [[state] * 3 for state in v]
    if config.topology == "hyper_connections":
        h = reference.read_streams(config, weights, 0, streams)
    blocks = {"prelude": (x, v)}
    for t in range(len(config.chunk_sizes)):
        update = reference.run_iteration(config, weights, t, h)
        if config.topology == "mesh":
            memory, new = reference.run_mesh_cycle(weights, t + 1, memory, new=update, entered=h)
        elif config.topology == "hyper_connections":
            streams = reference.write_streams(config, weights, t, streams, update)
            new = reference.read_streams(config, weights, t + 1, streams)
        else:
            carried = {"anchor": v, "residual": h, "base": [torch.zeros_like(state) for state in x]}[config.topology]
            new = [u + c for u, c in zip(update, carried, strict=True)]
        blocks[f"iteration {t}"], h = (h, new), new
    blocks["coda"] = (h, reference.run_layers(config, weights, "model.coda", range(config.num_coda_layers), h))
    sizes = {}
    for name, states in blocks.items():
        pairs = [(b, a) for b, a in zip(*states, strict=True) if b.norm() > 0]
        sizes[name] = sum(float((a - b).norm() / b.norm()) for b, a in pairs) / len(pairs)
    return sizes


@pytest.mark.parametrize("options", OPTIONS)
def test_updates_are_those_of_the_reference(options):
    model, ids = small_model(**options), random_ids(2, 21)
    expected = [reference_updates(model, row.tolist()) for row in ids]
    found = collect(model, ids, batch_size=2)["updates"]
    assert list(found) == ["prelude", "iteration 0", "iteration 1", "iteration 2", "coda"]
    for name, size in found.items():
        assert size == pytest.approx((expected[0][name] + expected[1][name]) / 2, rel=1e-5), name
    assert len({round(size, 4) for size in found.values()}) == 5


def test_blocks_without_layers_have_no_update():
    model = small_model(chunk_sizes=[1, 2], num_prelude_layers=0, num_coda_layers=0)
    assert list(collect(model, random_ids(1, 8), 1)["updates"]) == ["iteration 0", "iteration 1"]


def metrics_by_hand(attention: np.ndarray, chunk_size: int) -> tuple[float, float]:
    """Entropy and local mass of one `(K, K)` matrix, entry by entry."""
    keys, window = len(attention), math.ceil(32 / chunk_size)
    marginal = [sum(attention[q][k] for q in range(keys)) / keys for k in range(keys)]
    entropy = -sum(p * math.log(p) for p in marginal if p > 0) / math.log(keys)
    mass = sum(attention[q][k] for q in range(keys) for k in range(max(0, q - window), q)) / keys
    return entropy, mass


LLAMA = {"layer_family": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    "options", [{}, {"share_core": False}, {"chunk_sizes": [16, 1], "num_core_layers": 1}, LLAMA], ids=str
)
def test_metrics_are_those_of_the_attentions_that_the_model_gives_out(options):
    model, ids = small_model(**options), random_ids(3, 70)
    config = model.config
    found = collect(model, ids, batch_size=2)
    latents = [(70 + size // 2) // size for size in config.chunk_sizes]
    assert found["latents"] == latents and found["chunk_sizes"] == config.chunk_sizes
    model.set_attn_implementation("eager")
    for sequence, row in enumerate(ids):
        attentions = model(row[None], use_cache=False, output_attentions=True).attentions
        assert len(attentions) == config.num_hidden_layers
        core = [(t, i, entry) for t in range(config.num_iterations) for i, entry in enumerate(config.core_entries(t))]
        assert len(core) == config.num_iterations * config.num_core_layers
        for iteration, layer, entry in core:
            attention = attentions[entry]
            assert attention.shape == (1, 2, latents[iteration], latents[iteration])
            for head, matrix in enumerate(attention[0].detach().numpy()):
                by_hand = metrics_by_hand(matrix, config.chunk_sizes[iteration])
                for name, value in zip((ENTROPY, LOCAL_MASS), by_hand, strict=True):
                    samples = found["metrics"][name]["samples"]
                    assert samples[sequence][iteration][layer][head] == pytest.approx(value, rel=1e-6)
    for iteration, size in enumerate(config.chunk_sizes):
        by_hand = metrics_by_hand(uniform_attention(latents[iteration]).tolist(), size)
        uniform = [found["metrics"][name]["uniform"][iteration] for name in METRICS]
        assert uniform == pytest.approx(by_hand, rel=1e-5)
    for metric in found["metrics"].values():
        assert np.array(metric["values"]) == pytest.approx(np.mean(metric["samples"], axis=0))
        assert metric["dynamic_heads"] == dynamic_heads(torch.tensor(metric["values"]))


@torch.no_grad()
def test_coefficients_make_of_the_parts_what_mesh_reads():
    """Token by token: x, v and the updates that went in, each times its number, are the state that came out."""
    model, ids, calls = small_model(), random_ids(2, 21), []
    model.model.topology.register_forward_hook(lambda module, inputs, outputs: calls.append((*inputs, outputs[0])))
    with eager_evaluation(model), recorded(model) as recording:
        model(ids, use_cache=False)
    found = coefficients(recording.routers["write"], recording.routers["read"])
    x, parts = calls[0][1], []
    assert len(calls) == len(found) == 4
    for numbers, (new, *_, read) in zip(found, calls, strict=True):
        parts.append(new)
        made = sum(number[..., None] * part for number, part in zip(numbers.unbind(-1), [x, *parts], strict=True))
        assert (made - read).abs().max() < 1e-12 and numbers.std() > 1e-3
    averaged = collect(model, ids, batch_size=1)["routers"]
    assert averaged["sources"] == ["x", "v", "u_0", "u_1", "u_2"]
    for cycle, numbers in enumerate(found):
        assert averaged["coefficients"][cycle] == pytest.approx(numbers.mean(dim=(0, 1)).tolist(), rel=1e-6)
        for kind in ("read", "write"):
            weights = recording.routers[kind][cycle]
            entropy = -(weights * weights.log()).sum(-1).mean().item() / math.log(6)
            assert averaged[f"{kind} entropy"][cycle] == pytest.approx(entropy, rel=1e-6)


@torch.no_grad()
def test_even_and_collapsed_routers_are_told_apart():
    model, ids = small_model(), random_ids(1, 12)
    for parameter in model.model.topology.parameters():
        parameter.zero_()
    even = collect(model, ids, 1)["routers"]
    assert even["read entropy"] == even["write entropy"] == pytest.approx([1.0] * 4)
    assert [len(row) for row in even["coefficients"]] == [2, 3, 4, 5]
    assert all(row == pytest.approx([1 / 6] * len(row)) for row in even["coefficients"])  # T + 3 slots
    for router in model.model.topology.read:
        router.bias[0] = 50.0
    collapsed = collect(model, ids, 1)["routers"]
    assert collapsed["read entropy"] == pytest.approx([0.0] * 4, abs=1e-9)
    assert all(row == pytest.approx([1.0, *[1 / 6] * (len(row) - 1)]) for row in collapsed["coefficients"])
    assert router_entropy(torch.ones(2, 3, 1)).tolist() == [[0.0] * 3] * 2  # one slot leaves no choice


def test_other_topologies_have_no_routers():
    for topology in ("anchor", "hyper_connections"):
        assert collect(small_model(topology=topology), random_ids(1, 12), 1)["routers"] is None


def test_batches_do_not_change_what_is_found():
    model, ids = small_model(), random_ids(5, 40)
    one, all_at_once = (collect(model, ids, batch_size) for batch_size in (1, 5))
    for name in METRICS:
        samples = [np.array(found["metrics"][name]["samples"]) for found in (one, all_at_once)]
        assert samples[0].shape == (5, 3, 2, 2) and samples[0] == pytest.approx(samples[1], rel=1e-6)
    assert one["updates"] == pytest.approx(all_at_once["updates"], rel=1e-6)


def test_probing_leaves_the_model_as_it_was():
    model, ids = small_model(hidden_dropout=0.5, attention_dropout=0.5), random_ids(2, 20)
    expected = collect(model, ids, 2)
    model.train()
    topology, modules = model.model.topology, list(model.modules())
    attributes = dict(vars(topology))
    assert collect(model, ids, 2) == expected
    assert model.training and model.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="stop"), eager_evaluation(model), recorded(model):
        assert model.config._attn_implementation == "eager" and not model.training and topology._forward_hooks
        raise RuntimeError("stop")
    assert model.training and model.config._attn_implementation == "sdpa" and vars(topology) == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize(
    "options, length, message",
    [
        ({"chunk_sizes": [], "num_core_layers": 0}, 9, r"`chunk_sizes` must have two iterations or more .* got \[\]"),
        ({"chunk_sizes": [4]}, 9, r"`chunk_sizes` must have two iterations or more to compare, but got \[4\]"),
        ({}, 5, r"`length` must be in \[6, max_position_embeddings = 512\] .* \[4, 2, 1\], but got 5"),
        ({"causal_shifts": [9, 1, 0]}, 9, r"`length` must be in \[10, .* but got 9"),
        ({"max_position_embeddings": 8}, 9, r"`length` must be in \[6, max_position_embeddings = 8\] .* but got 9"),
    ],
)
def test_models_and_lengths_that_cannot_be_probed_are_refused(options, length, message):
    with pytest.raises(ValueError, match=message):
        collect(small_model(**options), random_ids(1, length), 1)


def test_the_shortest_allowed_length_is_probed():
    for options, length in (({}, 6), ({"causal_shifts": [9, 1, 0], "topology": "base"}, 10)):
        found = collect(small_model(**options), random_ids(1, length), 1)
        assert min(found["latents"]) >= 2 and all(map(math.isfinite, found["updates"].values()))


def test_text_is_cut_into_sequences_without_special_tokens():
    text = "<|eos|> is text here; " + TEXT
    ids = TOKENIZER.encode(text, split_special_tokens=True)
    assert TOKENIZER.eos_token_id not in ids
    assert cut_text(text, TOKENIZER, 3, 50).tolist() == [ids[:50], ids[50:100], ids[100:150]]
    with pytest.raises(ValueError, match=rf"`text` must hold 2 sequences of 99999 tokens, 199998 .* got {len(ids)}:"):
        cut_text(text, TOKENIZER, 2, 99999)


def test_molecules_of_one_length_are_sequences():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenization" / "smiles")
    molecules = ["CCOC", "CCO", "CCCl", "C", "CBrC", "CCN"]
    assert choose_molecules(molecules, tokenizer, 3, 5).tolist() == tokenizer(["CCO", "CCCl", "CBrC"])["input_ids"]
    with pytest.raises(ValueError, match="`text` must hold 5 molecules of 5 tokens, but has 4"):
        choose_molecules(molecules, tokenizer, 5, 5)


# -- the script -------------------------------------------------------------------------------------------------------


def save(folder: Path, model) -> Path:
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A model, and a looped control at full resolution of two iterations, each with its tokenizer."""
    folder, common = tmp_path_factory.mktemp("checkpoints"), {"vocab_size": 4096, "max_position_embeddings": 256}
    sizes = {"my_model": [8, 4, 2, 1], "my_control": [1, 1]}
    models = {
        name: SpiralFormerForCausalLM(small_config(chunk_sizes=chunks, **common)) for name, chunks in sizes.items()
    }
    return {name: save(folder / name, large_weights(model)) for name, model in models.items()}


@pytest.fixture
def text_file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def arguments(checkpoints, text_file: Path, *more: str) -> list[str]:
    named = ["--model", str(checkpoints["my_model"]), "--text", str(text_file)]
    return [*named, "--output_dir", str(text_file.parent / "new" / "folder"), "--sequences", "3", *more]


def test_table_json_and_pictures_hold_what_was_found(checkpoints, text_file, tmp_path, capsys):
    control = ("--control", str(checkpoints["my_control"]), "--length", "64", "--batch_size", "2")
    results = probe.main(arguments(checkpoints, text_file, *control))
    folder = tmp_path / "new" / "folder"
    written = json.loads((folder / "probes.json").read_text())
    assert written == json.loads(json.dumps(results)) and list(written["models"]) == ["model", "control"]
    ids = cut_text(TEXT, TOKENIZER, 3, 64)
    model = SpiralFormerForCausalLM.from_pretrained(checkpoints["my_model"])
    assert results["models"]["model"]["metrics"] == collect(model, ids, 2)["metrics"]

    printed = capsys.readouterr().out
    assert printed == (folder / "probes.md").read_text() == plot_probes.report(written) + "\n"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    row = next(row for row in rows if row and row[0] == "model, iteration 1")
    expected = ["1/4", "16", "8"]
    for name in METRICS:
        metric = written["models"]["model"]["metrics"][name]
        level = np.array(metric["values"])[1]
        dynamic = [level[layer, head] for layer, head in metric["dynamic_heads"]]
        expected += [f"{value:.3f}" for value in (np.median(level), np.median(dynamic), metric["uniform"][1])]
    assert row[1:] == expected
    routers = written["models"]["control"]["routers"]
    values = [routers["read entropy"][1], routers["write entropy"][1], *routers["coefficients"][1]]
    assert ["", "read entropy", "write entropy", "x", "v", "u_0", "u_1", "u_2", "u_3"] in rows
    assert ["control, cycle 1", *(f"{value:.3f}" for value in values), "-", "-", "-"] in rows
    update = written["models"]["control"]["updates"]["iteration 1"]
    assert ["control, iteration 1", f"{update:.3f}"] in rows

    names = {"ridgelines.png", "heads.png", "updates.png"}
    assert {path.name for path in folder.iterdir()} == names | {"probes.json", "probes.md"}
    plot_probes.draw(written, tmp_path / "redrawn")
    for name in names:
        picture = (folder / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and (tmp_path / "redrawn" / name).read_bytes() == picture


def test_another_window_moves_the_local_mass_alone(checkpoints, text_file, capsys):
    how = ("--length", "64", "--local_tokens", "8")
    narrow = probe.main(arguments(checkpoints, text_file, *how))
    assert "local: the last 8 tokens." in capsys.readouterr().out
    wide = probe.main(arguments(checkpoints, text_file, "--length", "64"))
    assert (narrow["local_tokens"], wide["local_tokens"]) == (8, 32)
    found = [results["models"]["model"] for results in (narrow, wide)]
    assert [probed["windows"] for probed in found] == [[1, 2, 4, 8], [4, 8, 16, 32]]
    entropies, masses = ([probed["metrics"][name] for probed in found] for name in METRICS)
    assert entropies[0] == entropies[1]
    model = SpiralFormerForCausalLM.from_pretrained(checkpoints["my_model"], attn_implementation="eager").eval()
    with torch.no_grad():
        attention = model(cut_text(TEXT, TOKENIZER, 3, 64), use_cache=False, output_attentions=True).attentions
    core = attention[model.config.num_prelude_layers :][: 4 * model.config.num_core_layers]
    last = local_attention_mass(core[-1], 8).mean(dim=0).tolist()
    assert masses[0]["values"][-1][-1] == pytest.approx(last, abs=1e-5)
    assert masses[0]["uniform"][-1] == pytest.approx(local_attention_mass(uniform_attention(64), 8).item())


def test_changes_are_counted_head_by_head_and_beside_uniform_attention():
    entropy = {"values": [[[0.9, 0.8, 0.5]], [[0.0, 0.0, 0.0]], [[0.7, 0.85, 0.58]]], "uniform": [0.8, 0.0, 0.9]}
    mass = {"values": [[[0.1, 0.2, 0.3]], [[0.9, 0.9, 0.9]], [[0.4, 0.25, 0.2]]], "uniform": [0.3, 0.0, 0.4]}
    metrics = [metric | {"dynamic_heads": [(0, 0)]} for metric in (entropy, mass)]
    table = plot_probes.change_table({"mine": {"metrics": dict(zip(METRICS, metrics, strict=True))}})
    cells = [cell.strip() for cell in table.splitlines()[-1].split("|")[1:-1]]
    # Entropies change by -0.2, 0.05 and 0.08, uniform attention's by 0.1; masses by 0.3, 0.05 and -0.1, and 0.1.
    assert cells[:5] == ["mine", "+0.050", "+0.100", "1 of 3", "3 of 3"]
    assert cells[5:] == ["+0.050", "+0.100", "2 of 3", "1 of 3"]


def test_pictures_show_every_iteration_head_and_block(checkpoints, text_file):
    control = ("--control", str(checkpoints["my_control"]), "--length", "64")
    results = probe.main(arguments(checkpoints, text_file, *control))
    metrics = results["models"]["model"]["metrics"]
    ridges, heads, updates = (
        picture(results).axes
        for picture in (plot_probes.draw_ridgelines, plot_probes.draw_heads, plot_probes.draw_updates)
    )
    assert [len(axes.get_yticks()) for axes in ridges] == [4, 2, 4, 2]
    assert [len(axes.patches) for axes in ridges] == [8, 4, 8, 4]  # a filled ridge and its outline
    assert "of 12 (sequence, layer, head) samples" in ridges[0].get_xlabel()  # 3 * 2 * 2
    for axes, name in zip(heads[::2], METRICS, strict=True):
        values = np.array(metrics[name]["values"]).reshape(4, -1)
        lines = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 4]
        assert all(any(np.array_equal(line, head) for line in lines) for head in values.T)
        (marks,) = (segments for segments in axes.collections if len(segments.get_segments()) == 4)
        assert [segment[0][1] for segment in marks.get_segments()] == metrics[name]["uniform"]
        assert len(axes.patches) == 8  # boxes of all heads and of the dynamic ones
    bars = [bar.get_height() for bar in updates[0].patches]
    assert bars == list(results["models"]["model"]["updates"].values())


def test_samples_and_heads_are_gathered_by_iteration():
    samples = np.arange(2 * 3 * 2 * 2, dtype=float).reshape(2, 3, 2, 2)  # sequences, iterations, layers, heads
    metric = {"samples": samples.tolist(), "values": samples[0].tolist(), "dynamic_heads": [(1, 0)]}
    assert plot_probes.samples_by_iteration(metric)[1].tolist() == [4, 5, 6, 7, 16, 17, 18, 19]
    heads, dynamic = plot_probes.heads_by_iteration(metric)
    assert heads[2].tolist() == [8, 9, 10, 11] and dynamic.tolist() == [[2], [6], [10]]


def test_the_length_is_what_both_models_claim_or_less(checkpoints, text_file, tmp_path, monkeypatch):
    assert probe.main(arguments(checkpoints, text_file))["length"] == 256
    shorter = save(
        tmp_path / "shorter", SpiralFormerForCausalLM(small_config(vocab_size=4096, max_position_embeddings=32))
    )
    assert probe.main(arguments(checkpoints, text_file, "--control", str(shorter)))["length"] == 32
    monkeypatch.setattr(measures, "collect", None)  # refused before the model takes its time
    with pytest.raises(ValueError, match="`length` must be in .* max_position_embeddings = 32"):
        probe.main(arguments(checkpoints, text_file, "--control", str(shorter), "--length", "33"))


@pytest.mark.parametrize(
    "more, message",
    [
        (("--sequences", "0"), "`sequences` must be an integer >= 1, but got 0"),
        (("--batch_size", "0"), "`batch_size` must be an integer >= 1, but got 0"),
        (("--length", "257"), r"`length` must be in \[12, max_position_embeddings = 256\]"),
        (("--length", "11"), r"`length` must be in \[12, "),
        (("--smiles",), "`length` must be given with `smiles`"),
        (("--sequences", "999"), "`text` must hold 999 sequences of 256 tokens"),
    ],
)
def test_bad_settings_are_refused(checkpoints, text_file, more, message):
    with pytest.raises(ValueError, match=message):
        probe.main(arguments(checkpoints, text_file, *more))


def test_checkpoints_without_a_loop_are_refused(checkpoints, text_file, tmp_path):
    plain = SpiralFormerForCausalLM(small_config(vocab_size=4096, chunk_sizes=[], num_core_layers=0))
    neox = GPTNeoXConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=24)
    for name, model, message in (
        ("plain", plain, r"`chunk_sizes` must have two iterations or more to compare, but got \[\]"),
        ("neox", GPTNeoXForCausalLM(neox), "must be a SpiralFormer, but got `model_type` 'gpt_neox'"),
    ):
        with pytest.raises(ValueError, match=message):
            probe.main(arguments(checkpoints, text_file, "--control", str(save(tmp_path / name, model))))


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_table_of_the_page_is_that_of_uniform_attention():
    page = (ROOT / "docs" / "probes.md").read_text()
    for size in (8, 4, 2, 1):
        keys = (256 + size // 2) // size
        figures = [f"{value:.3f}" for value in measure(uniform_attention(keys), size).tolist()]
        cells = [format_resolution(size), str(keys), str(local_window(size)), *figures]
        assert f"| {' | '.join(cells)} |" in page


def test_the_script_runs_as_the_page_says(workplace, checkpoints):
    command, _ = commands("docs/probes.md")  # the other one: test_trained_models.py
    for name, folder in checkpoints.items():
        (workplace / name).symlink_to(folder)
    words = shlex.split(command)
    assert words[:2] == ["python", "scripts/probe.py"]
    printed = run([sys.executable, *words[1:]], workplace)
    assert "| control, iteration 1 | 1 |" in printed and "| model, coda |" in printed
    assert (workplace / "runs" / "probe" / "ridgelines.png").is_file()
