"""Files of a checkpoint: SHA256SUMS beside them is believed, and damage is an error that names the file."""

import json
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support import small_model
from transformers import AutoModelForCausalLM

from modeling_spiralformer import SpiralFormerForCausalLM
from modeling_spiralformer.files_spiralformer import check_digests, digest, read_digests, write_digests

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    small_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def shards(tmp_path) -> Path:
    small_model(dtype=torch.float32).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    return tmp_path / "shards"


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def load(folder: Path) -> dict[str, torch.Tensor]:
    """The weights, copied: those of a model are still in its file."""
    return {name: value.clone() for name, value in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()}


# -- digests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [-1, -1000, 200])
def test_a_bit_of_the_weights_is_told_by_its_digest(folder, place):
    before = load(folder)
    write_digests(folder)
    assert all(torch.equal(value, before[name]) for name, value in load(folder).items())
    flip(folder / WEIGHTS, place)
    for model_class in (SpiralFormerForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="as its SHA256SUMS says, but model.safetensors has other content"):
            model_class.from_pretrained(folder)


def test_without_digests_a_bit_of_the_weights_goes_unnoticed(folder):
    """Why there are digests."""
    before = load(folder)
    flip(folder / WEIGHTS, -1)
    assert any(not torch.equal(value, before[name]) for name, value in load(folder).items())


def test_a_change_on_purpose_loads_without_its_line(folder):
    write_digests(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"layer_norm_eps": 1e-3}), encoding="utf-8")
    with pytest.raises(ValueError, match="but config.json has other content: .* take the line out of SHA256SUMS"):
        load(folder)
    kept = [line for line in (folder / "SHA256SUMS").read_text("utf-8").splitlines() if "config.json" not in line]
    (folder / "SHA256SUMS").write_text("\n".join(kept) + "\n", encoding="utf-8")
    assert SpiralFormerForCausalLM.from_pretrained(folder).config.layer_norm_eps == 1e-3
    (folder / "generation_config.json").unlink()
    write_digests(folder)
    assert set(read_digests(folder)) == {"config.json", WEIGHTS}


def test_every_file_that_is_not_as_listed_is_named(shards):
    write_digests(shards)
    first, second = sorted(path.name for path in shards.glob("*.safetensors"))[:2]
    flip(shards / first, -1)
    (shards / second).unlink()
    with pytest.raises(ValueError, match=f"but {first} has other content, {second} is missing"):
        load(shards)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="the command is part of GNU's coreutils")
def test_the_file_is_that_of_sha256sum(folder):
    write_digests(folder)
    assert subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder).returncode == 0
    made = subprocess.run("sha256sum ./* > SHA256SUMS", shell=True, cwd=folder).returncode
    assert made == 0 and read_digests(folder)[WEIGHTS] == digest(folder / WEIGHTS)
    load(folder)
    flip(folder / WEIGHTS, -1)
    with pytest.raises(ValueError, match="model.safetensors has other content"):
        load(folder)


def test_saving_anew_lists_the_new_files(folder, shards):
    (folder / "notes.txt").write_text("kept", encoding="utf-8")
    write_digests(folder, ["*"])
    notes = read_digests(folder)["notes.txt"]
    small_model(dtype=torch.float32, seed=1).save_pretrained(folder)
    load(folder)
    assert read_digests(folder)["notes.txt"] == notes and read_digests(folder)[WEIGHTS] == digest(folder / WEIGHTS)
    small_model(dtype=torch.float32).save_pretrained(shards)
    assert not (shards / "SHA256SUMS").exists()  # nobody asked for it


WAYS = [{}, {"max_shard_size": "20KB"}, {"max_shard_size": "30KB"}]


@pytest.mark.parametrize("first", WAYS, ids=["file", "shards", "fewer"])
@pytest.mark.parametrize("second", WAYS, ids=["file", "shards", "fewer"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_save_over_another_leaves_one_model(first, second, variant, tmp_path):
    """Files, digests and weights are those of the second save alone; those of another variant stay."""
    old, new = (small_model(dtype=torch.float32, seed=seed) for seed in (0, 1))
    other = "bf16" if variant else "fp16"
    old.save_pretrained(tmp_path / "over", variant=other)
    old.save_pretrained(tmp_path / "over", variant=variant, **first)
    write_digests(tmp_path / "over")
    for folder in ("over", "alone"):
        new.save_pretrained(tmp_path / folder, variant=variant, **second)
    files = {path.name for path in (tmp_path / "over").iterdir()} - {"SHA256SUMS", f"model.{other}.safetensors"}
    assert files == {path.name for path in (tmp_path / "alone").iterdir()}
    check_digests(tmp_path / "over", ["*"])
    loaded = SpiralFormerForCausalLM.from_pretrained(tmp_path / "over", variant=variant).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in new.state_dict().items())
    kept = SpiralFormerForCausalLM.from_pretrained(tmp_path / "over", variant=other).state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in old.state_dict().items())


def test_shards_of_other_names_do_not_take_the_place_of_a_new_file(shards):
    """The library leaves them where they are: their index is none of a save."""
    index = shards / "model.safetensors.index.json"
    text = index.read_text("utf-8")
    for path in shards.glob("*.safetensors"):
        path.rename(path.with_name(path.name.replace("-0000", "-000000")))
    index.write_text(text.replace("-0000", "-000000"), encoding="utf-8")
    new = small_model(dtype=torch.float32, seed=1)
    new.save_pretrained(shards)
    assert not index.exists()
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in load(shards).items())


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_removes_files(rank, folder, monkeypatch):
    """Another would read an index that the first is still writing."""
    write_digests(folder)
    (folder / WEIGHTS).write_bytes(b"new")
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    (folder / "model.safetensors.index.json").write_text("{", encoding="utf-8")
    small_model(dtype=torch.float32).save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists() == (rank == 1)
    assert (read_digests(folder)[WEIGHTS] == digest(folder / WEIGHTS)) == (rank == 0)


def test_an_index_beside_one_file_is_not_read(shards):
    """As the library has it: it loads the file."""
    new = small_model(dtype=torch.float32, seed=1)
    new.save_pretrained(shards.parent / "new")
    shutil.copy(shards.parent / "new" / WEIGHTS, shards)
    next(shards.glob("model-*.safetensors")).unlink()
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in load(shards).items())


@pytest.mark.parametrize(
    "text, line",
    [("12ab  config.json\n", 1), ("{0}  a\n{0}  ./a\n", 2), ("{0}\n", 1), ("{0} a\n", 1), ("{0}  a\n\n", 2)],
)
def test_other_texts_are_refused_by_line(text, line, folder):
    (folder / "SHA256SUMS").write_text(text.format("0" * 64), encoding="utf-8")
    with pytest.raises(ValueError, match=f"SHA256SUMS, line {line}, must be a digest of 64"):
        load(folder)


def test_another_thing_in_the_place_of_the_digests_is_refused(folder):
    (folder / "SHA256SUMS").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="SHA256SUMS must be a text in UTF-8"):
        load(folder)
    (folder / "SHA256SUMS").unlink()
    (folder / "SHA256SUMS").symlink_to(folder / "nowhere")
    with pytest.raises(ValueError, match="SHA256SUMS must be a text in UTF-8"):
        check_digests(folder)


# -- without digests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"a": 1, "a": 2}', "{}".encode("utf-16")])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_json_object_is_named(name, content, folder):
    """The library would go on without the generation configuration."""
    (folder / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=name):
        SpiralFormerForCausalLM.from_pretrained(folder)
    # The library reads the configuration first, to find the class: what it says of `null` names nothing.
    with pytest.raises(TypeError if (name, content) == ("config.json", b"null") else (ValueError, OSError)):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises((ValueError, OSError), match=name):
        SpiralFormerForCausalLM.from_pretrained(folder)


def test_damaged_safetensors_are_named(shards):
    name = sorted(path.name for path in shards.glob("*.safetensors"))[1]
    (shards / name).write_bytes((shards / name).read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"has damaged safetensors: {name}: "):
        load(shards)


@pytest.mark.parametrize("places", [None, [], {}, {"lm_head.weight": 3}, {"lm_head.weight": "nowhere.safetensors"}])
def test_an_index_that_does_not_say_where_weights_are_is_named(shards, places):
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    with pytest.raises(ValueError, match="model.safetensors.index.json must "):
        load(shards)


def test_a_folder_without_a_configuration_is_no_default_model(folder):
    config = SpiralFormerForCausalLM.from_pretrained(folder).config
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="must hold config.json, but has none"):
        SpiralFormerForCausalLM.from_pretrained(folder)
    assert SpiralFormerForCausalLM.from_pretrained(folder, config=config).config is not None


class Harmful:
    """A pickle that runs code where it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["archive", "bare"])
def test_code_in_weights_of_the_older_kind_is_not_run(folder, form, tmp_path):
    trap, path = tmp_path / "ran", folder / "pytorch_model.bin"
    (folder / WEIGHTS).unlink()
    if form == "archive":
        torch.save({"lm_head.weight": Harmful(trap)}, path)
    else:
        path.write_bytes(pickle.dumps({"lm_head.weight": Harmful(trap)}))
    with pytest.raises(Exception, match="[Ww]eights.only|pytorch_model.bin"):
        load(folder)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Harmful(trap)))
    assert trap.exists()  # the trap works


def test_what_is_uploaded_has_the_digests_of_its_files(tmp_path, monkeypatch):
    """Also where the folder, or the repository, has those of older files."""
    model, uploaded = small_model(dtype=torch.float32), []
    monkeypatch.setattr(
        "transformers.utils.hub.PushToHubMixin._upload_modified_files",
        lambda self, folder, *args, **kwargs: uploaded.append(read_digests(Path(folder))),
    )
    for old in ({}, {"model.safetensors": "0" * 64}):
        model.save_pretrained(tmp_path)
        (tmp_path / "SHA256SUMS").write_text("".join(f"{value}  {name}\n" for name, value in old.items()))
        (tmp_path / "model.safetensors.index.json").write_text("{}", encoding="utf-8")  # of shards that are gone
        model._upload_modified_files(tmp_path, "me/model", {})
    assert uploaded[0] == uploaded[1] and "model.safetensors.index.json" not in uploaded[1]
    for name in ("model.safetensors", "config.json"):
        assert uploaded[1][name] == digest(tmp_path / name)
