"""The commands that quantise a cache and share its entries: their figures against the definition, and their tables."""

import json
import shlex
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import commands
from support import large_weights, random_ids, small_model
from test_molecule_runs import MOLECULES, TOKENIZER
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import compare_cache_precision
import compare_cache_sharing
from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM, SpiralFormerQuantizedCache
from workshop import padded_rows
from workshop.molecules import cache_sharing
from workshop.molecules.cache_precision import Way, bytes_per_token, levels_of, losses_through_cache
from workshop.molecules.cache_sharing import FIRST, FIRST_ALONE, LAST, MEAN, WAYS, SharedKeys, groups_of, sharing_cache
from workshop.molecules.quantising import ratio
from workshop.molecules.rows import make_rows
from workshop.padded_rows import losses_of_rows

SCHEDULES = {"spiral": [4, 1], "looped": [1, 1, 1]}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Random models of a vocabulary of molecules, with their tokenizer, and a file of molecules."""
    folder = tmp_path_factory.mktemp("models")
    for name, sizes in SCHEDULES.items():
        config = SpiralFormerConfig(
            vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=20, num_attention_heads=2,
            num_prelude_layers=1, num_core_layers=1, num_coda_layers=0, chunk_sizes=sizes, topology="anchor",
            max_position_embeddings=24, pad_token_id=TOKENIZER.pad_token_id,
        )  # fmt: skip
        large_weights(SpiralFormerForCausalLM(config)).save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    (folder / "valid.txt").write_text("\n".join(MOLECULES) + "\n", encoding="utf-8")
    return folder


def words(models: Path, output: Path, *more: str) -> list[str]:
    folders = [str(models / name) for name in SCHEDULES]
    return ["--data_file", str(models / "valid.txt"), "--models", *folders, "--output_dir", str(output), *more]


# -- quantised ----------------------------------------------------------------------------------------------------


def test_losses_through_a_cache_are_those_of_decoding(models):
    model = SpiralFormerForCausalLM.from_pretrained(models / "spiral").eval().double()
    rows, options = make_rows(MOLECULES[:3], TOKENIZER, 24), {"nbits": {4: 4, 1: 8}}
    found = losses_through_cache(model, TOKENIZER, rows, options)
    for ids, (loss, count) in zip(rows["input_ids"], found, strict=True):
        cache, expected = SpiralFormerQuantizedCache(model.config, **options), 0.0
        with torch.no_grad():
            for token, target in zip(ids[:-1], ids[1:], strict=True):
                logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, 0]
                expected -= logits.log_softmax(-1)[target].item()
        assert count == len(ids) - 1 and loss == pytest.approx(expected, rel=1e-5)


def test_levels_and_bytes(models):
    model = SpiralFormerForCausalLM.from_pretrained(models / "spiral")
    assert levels_of(model) == {"1/4": [4], "1": [1], "all": [4, 1]}
    assert Way(4, finest=8).options([4, 1]) == {"nbits": {4: 4, 1: 8}, "q_group_size": None}
    assert Way(4, finest=8).options([4]) is None
    plain = bytes_per_token(model, {"nbits": 16})
    assert plain == pytest.approx(2 * 2 * 8 * 2 * (2 + 1 / 4), rel=0.02)
    # Of the 16 bytes of a head int8 leaves 8 + 4, int4 4 + 4; there are 2 heads of keys and of values.
    assert plain - bytes_per_token(model, Way(8).options([4])) == pytest.approx(4 * (16 - 12) / 4)
    assert plain - bytes_per_token(model, Way(4).options([1])) == pytest.approx(4 * (16 - 8) * 2)
    assert plain - bytes_per_token(model, Way(4, 4).options([1])) == pytest.approx(4 * (16 - 12) * 2)


def test_the_command_of_the_page_quantises_level_by_level(models, tmp_path, capsys):
    command, _ = map(shlex.split, commands("docs/cache_precision.md"))
    assert command[:2] == ["python", "scripts/compare_cache_precision.py"] and command[2::2] == ["--data_file"]
    more = ["--molecules", "9", "--group_size", "4"]
    results = compare_cache_precision.main([*command[2:], *words(models, tmp_path / "out", *more)])
    assert list(results) == list(SCHEDULES) and list(results["looped"]["levels"]) == ["all"]
    model = SpiralFormerForCausalLM.from_pretrained(models / "spiral").eval()
    rows = make_rows(MOLECULES[:9], TOKENIZER, 24)
    before = losses_of_rows(model, TOKENIZER, rows)
    for level, name, options in (
        ("1/4", "int4, groups of 4", {"nbits": {4: 4}, "q_group_size": 4}),
        ("all", "int8, heads", {"nbits": 8}),
        ("all", "int4, heads, the finest level int8", {"nbits": {4: 4, 1: 8}}),
    ):
        after = losses_through_cache(model, TOKENIZER, rows, options)
        way = results["spiral"]["levels"][level][name]
        assert way["difference"]["value"] == pytest.approx(ratio(after[:, 0] - before[:, 0], before[:, 1])["value"])
        assert way["nats_per_token"] == pytest.approx(after[:, 0].sum() / after[:, 1].sum())
        assert way["difference"]["value"] != 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "cache_precision.md").read_text() and printed.startswith("9 validation")
    assert sum(line.startswith("| spiral |") for line in printed.splitlines()) == 6
    assert json.loads((tmp_path / "out" / "cache_precision.json").read_text())["spiral"]["bytes"] > 100


@pytest.mark.parametrize("command", [compare_cache_precision, compare_cache_sharing])
def test_settings_are_checked(models, tmp_path, command):
    with pytest.raises(ValueError, match="`molecules` must be an integer >= 2"):
        command.main(words(models, tmp_path, "--molecules", "1"))


@pytest.mark.parametrize("command", [compare_cache_precision, compare_cache_sharing])
def test_models_of_one_name_are_refused(models, tmp_path, command):
    with pytest.raises(ValueError, match="`models` must be folders of different names, but got .*looped, .*looped/"):
        command.main(words(models, tmp_path, "--models", str(models / "looped"), f"{models / 'looped'}/"))


def test_a_model_that_cannot_share_is_refused_before_the_others_are_read(models, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_sharing, "compare_sharing", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="`models` must have `share_core` and a chunk size more than once"):
        compare_cache_sharing.main(words(models, tmp_path, "--models", str(models / "looped"), str(models / "spiral")))


# -- shared -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "kept"), [(FIRST, 10.0), (FIRST_ALONE, 10.0), (MEAN, 11.0), (LAST, 12.0)])
def test_what_is_kept_and_what_is_read(way, kept):
    """A latent's key is 10 times its number and its iteration."""
    shared = SharedKeys(way, 3)
    for latent in (1, 2, 3):
        for iteration in range(3):
            new = torch.tensor([[[[10.0 * latent + iteration]]]])
            keys, values = shared.update((new, -new))
            own = 10.0 * latent if way == FIRST_ALONE else 10.0 * latent + iteration
            assert keys.flatten().tolist() == [10 * (n - 1) + kept for n in range(1, latent)] + [own]
            assert torch.equal(values, -keys)


@contextmanager
def keys_of_the_first(model, group: list[int]):
    """Within, the iterations of a group attend to the keys and values of its first, whole texts at once."""
    iteration, first = [-1], {}

    def attention(module, query, key, value, *args, **kwargs):
        if iteration[0] == group[0]:
            first[module] = key, value
        if iteration[0] in group:
            key, value = first[module]
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("first_keys", attention)
    AttentionMaskInterface.register("first_keys", sdpa_mask)
    handles = [
        part.register_forward_pre_hook(lambda *_, t=t: iteration.__setitem__(0, t))
        for t, part in enumerate(model.model.resolutions)
    ]
    handles += [
        part.register_forward_hook(lambda *_: iteration.__setitem__(0, -1)) for part in model.model.resolutions
    ]
    model.config._attn_implementation = "first_keys"
    yield
    model.config._attn_implementation = "sdpa"
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_the_first_alone_is_what_a_whole_text_would_read():
    model, ids = small_model(chunk_sizes=[1, 4, 1, 1, 4], topology="anchor"), random_ids(2, 17)
    assert groups_of(model.config, None) == [[0, 2, 3], [1, 4]] and groups_of(model.config, 2) == [[2, 3], [1, 4]]
    cache = sharing_cache(model.config, [[0, 2, 3]], FIRST_ALONE)
    found = torch.cat([model(column, past_key_values=cache).logits for column in ids.split(1, dim=1)], dim=1)
    with keys_of_the_first(model, [0, 2, 3]):
        expected = model(ids, use_cache=False).logits
    assert (found - expected).abs().max() < 1e-9
    assert (found - model(ids, use_cache=False).logits).abs().max() > 1e-3
    unshared = sharing_cache(model.config, [], LAST)
    steps = [model(column, past_key_values=unshared).logits for column in ids.split(1, dim=1)]
    assert (torch.cat(steps, dim=1) - model(ids, use_cache=False).logits).abs().max() < 1e-9


@pytest.mark.parametrize("options", [{"chunk_sizes": [4, 2, 1]}, {"chunk_sizes": [2, 2], "share_core": False}])
def test_a_model_that_repeats_nothing_is_refused(options):
    with pytest.raises(ValueError, match="`models` must have `share_core` and a chunk size more than once"):
        groups_of(small_model(**options).config, None)


def test_the_command_of_the_page_shares_entries(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(padded_rows, "ROWS_AT_ONCE", 4)
    _, command = map(shlex.split, commands("docs/cache_precision.md"))
    assert command[:2] == ["python", "scripts/compare_cache_sharing.py"] and command[2::2] == ["--data_file"]
    more = ["--molecules", "6", "--models", str(models / "looped")]  # of a word that is there twice the last counts
    found = compare_cache_sharing.main([*command[2:], *words(models, tmp_path / "out", *more)])["looped"]
    model = SpiralFormerForCausalLM.from_pretrained(models / "looped").eval()
    losses = losses_of_rows(model, TOKENIZER, make_rows(MOLECULES[:6], TOKENIZER, 24))
    assert found["nats_per_token"] == pytest.approx(np.divide(*losses.sum(axis=0)), rel=1e-5)
    assert [(sharing["last"], sharing["entries"]) for sharing in found["sharing"]] == [(2, 3), (4, 2), (None, 2)]
    assert found["sharing"][1]["ways"] == found["sharing"][2]["ways"] != found["sharing"][0]["ways"]
    assert list(found["sharing"][0]["ways"]) == list(WAYS)
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "cache_sharing.md").read_text() and "| looped | last 2 | 4 to 3 |" in printed
    assert json.loads((tmp_path / "out" / "cache_sharing.json").read_text()) == {"looped": found}
