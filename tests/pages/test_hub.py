"""Push and pull: every way of it against a Hub on loopback, with the package and as a machine without it."""

import json
import os
import shlex
import shutil
import sys
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.distributed.fsdp  # the library looks up the file of a class
from documents import ROOT, commands, run
from hub_server import TOKEN, HubServer, Repository
from hub_snapshot import snapshot
from huggingface_hub import HfApi, ModelCard
from support import large_weights, random_ids, small_config, small_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import modeling_spiralformer as package
from modeling_spiralformer.files_spiralformer import check_digests, read_digests
from modeling_spiralformer.layers_spiralformer import FAMILIES
from modeling_spiralformer.modeling_spiralformer import AUTO_CLASSES
from push import PushArguments
from workshop import hub as hub_module
from workshop.hub import push
from workshop.model_card import CardTrainer, make_card

CODE = {path.name for path in (ROOT / "modeling_spiralformer").glob("*_spiralformer.py")}


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory) -> Path:
    """The folder where `hub_push.py` ran: it pushed everything, and wrote down what."""
    folder = tmp_path_factory.mktemp("pushed")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers", ROOT / "scripts")))
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "hub_push.py"), str(folder)]
    run(command, folder, **hub.environment(folder / "home") | {"PYTHONPATH": path})
    return folder


@pytest.mark.processes
def test_push_and_pull_where_the_package_is_installed(pushed, hub):
    """What `hub_push.py` checks itself, and what lies in the repositories then."""
    files = hub.files("me/lm", "v1")
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1 and "model.safetensors.index.json" in files
    assert files.keys() - set(shards) == CODE | {
        *("README.md", "config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "SHA256SUMS"),
    }
    for name in CODE:
        assert files[name] == (ROOT / "modeling_spiralformer" / name).read_bytes(), name
    assert json.loads(files["config.json"])["auto_map"].keys() == AUTO_CLASSES.keys() | {"AutoConfig"}
    assert hub.files("me/config").keys() == CODE | {"README.md", "config.json"}
    assert hub.repositories["me/example"].private and "v1" in hub.repositories["me/example"].tags


@pytest.mark.processes
def test_commits_made_while_training_hold_code_and_the_last_one_a_card(pushed, hub):
    commits = hub.repositories["me/card-trainer"].commits.values()
    with_weights = [files for files in commits if "model.safetensors" in files]
    assert len(with_weights) >= 2 and all(files.keys() > CODE for files in with_weights)
    card = hub.files("me/card-trainer")["README.md"].decode()
    assert "| learning_rate | 5e-05 |" in card and "| Loss | " in card and 'from_pretrained("me/card-trainer"' in card
    assert hub.files("me/trainer").keys() > CODE


@pytest.mark.processes
def test_pull_without_the_package(pushed, hub, tmp_path):
    other = Repository(private=False)
    files = {}
    for name, content in hub.files("me/lm", "v1").items():
        if name in CODE:  # a version of the code that works the same, and not together with this one
            content = content.replace(b".bind(", b".get_ready(").replace(b"def bind(", b"def get_ready(")
        files[name] = hub.keep(content)
    assert sum(hub.files("me/lm", "v1")[name].count(b"def bind(") for name in CODE) > 0
    other.branches["main"] = other.add_commit(files)
    hub.repositories["me/other-code"] = other
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "hub_pull.py"), str(pushed)]
    run(command, tmp_path, **hub.environment(tmp_path / "home"))


@pytest.mark.processes
def test_folders_load_where_the_package_is_not_installed(tmp_path):
    """Each Auto class from a folder of `save_pretrained` and of `Trainer`, and a configuration alone."""
    ids = random_ids(3, 21)
    expected = {"ids": ids}
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenization")
    for name, model_class in AUTO_CLASSES.items():
        model = large_weights(model_class(small_config(num_labels=3))).eval()
        model.save_pretrained(tmp_path / name)
        settings = TrainingArguments(str(tmp_path / f"{name}_by_Trainer"), report_to="none", use_cpu=True)
        Trainer(model, settings, processing_class=tokenizer).save_model()
        expected[name] = expected[f"{name}_by_Trainer"] = snapshot(model, {"input_ids": ids})
    for family in FAMILIES:
        model = small_model(dtype=torch.float32, layer_family=family)
        model.save_pretrained(tmp_path / f"AutoModelForCausalLM_{family}")
        expected[f"AutoModelForCausalLM_{family}"] = snapshot(model, {"input_ids": ids})
    small_config().save_pretrained(tmp_path / "config")
    torch.save(expected, tmp_path / "expected.pt")
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "folder_pull.py"), str(tmp_path)]
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    assert "loaded 13" in run(command, tmp_path, **environment)


@pytest.mark.processes
def test_commands_of_the_page(hub, workplace):
    for command in commands("docs/hub.md"):
        words = shlex.split(command)
        assert words[0] == "python"
        more = ["--report_to", "none"] if "scripts/train.py" in words else []
        run([sys.executable, *words[1:], *more], workplace, **hub.environment(workplace / "home"))
    files = hub.files("me/mine")
    assert files.keys() > CODE and "tokenizer.json" in files
    card = files["README.md"].decode()
    assert "license: apache-2.0" in card and "The file `text.txt`." in card and "| Bits Per Byte | " in card
    assert list(hub.repositories["me/mine"].messages.values())[-1] == "Upload model"


# -- what a saved model holds -------------------------------------------------------------------------------------


def saved(folder: Path, **options) -> Path:
    small_model(dtype=torch.float32, **options).save_pretrained(folder)
    return folder


def test_a_saved_model_holds_its_code_and_loads_by_the_installed_one(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail(f"was asked: {text}"))
    saved(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    loaded = set(sys.modules)
    for trust in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        assert type(AutoConfig.from_pretrained(tmp_path, **trust)) is package.SpiralFormerConfig
        assert type(AutoModel.from_pretrained(tmp_path, **trust)) is package.SpiralFormerModel
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, **trust)) is package.SpiralFormerForCausalLM
    assert not any(name.startswith("transformers_modules") for name in set(sys.modules) - loaded)


def test_a_model_that_fsdp_has_wrapped_saves_the_same_code(tmp_path):
    """fully_shard makes a class of its own, in a file of torch's, of the model's class."""
    model = small_model(dtype=torch.float32)
    module = {"__module__": "torch.distributed.fsdp._fully_shard._fsdp_init"}
    model.__class__ = type("FSDPSpiralFormerForCausalLM", (type(model),), module)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_spiralformer.SpiralFormerForCausalLM"


def test_a_class_of_the_users_own_stays_in_auto_map(tmp_path):
    config = small_config()
    config.auto_map = {"AutoModelForCausalLM": "mine.MyModel"}
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path).auto_map
    assert loaded["AutoModelForCausalLM"] == "mine.MyModel"
    assert loaded["AutoModel"] == "modeling_spiralformer.SpiralFormerModel"
    assert loaded["AutoConfig"] == "configuration_spiralformer.SpiralFormerConfig"


# -- cards --------------------------------------------------------------------------------------------------------


def test_a_card_says_what_it_was_told():
    evaluation = {"Bits Per Byte": 1.5}
    card = make_card(
        small_model(),
        "me/one",
        license="mit",
        language="en",
        base_model="me/base",
        dataset="me/texts",
        training_data="Old letters.",
        evaluation=evaluation,
        settings={"seed": 7},
    )
    data = ModelCard(card.content).data  # read again, as the Hub does
    assert (data.license, data.language, data.base_model, data.datasets) == ("mit", "en", "me/base", ["me/texts"])
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    (result,) = data.eval_results
    assert (result.metric_name, result.metric_value, result.dataset_type) == ("Bits Per Byte", 1.5, "me/texts")
    for words in (
        "# one\n",
        "1+2x{1/4,1/2,1}+1",
        "| topology | mesh |",
        'AutoModelForCausalLM.from_pretrained("me/one", revision="COMMIT", trust_remote_code=True)',
        "Old letters.",
        "| seed | 7 |",
        "| Bits Per Byte | 1.5 |",
        "longer than 512 tokens",
    ):
        assert words in card.content, words


@pytest.mark.parametrize(
    "options, words",
    [
        ({"chunk_sizes": [8, 4, 1]}, "a looped Transformer whose shared core runs 3 times, over chunks of 8, 4 and 1"),
        ({"chunk_sizes": [1, 1]}, "a looped Transformer whose shared core runs 2 times, over all tokens."),
        ({"chunk_sizes": [4]}, "whose shared core runs once, over chunks of 4 tokens."),
        ({"chunk_sizes": [2, 1], "share_core": False}, "whose core, with layers of its own each time, runs 2 times"),
        ({"chunk_sizes": [], "num_core_layers": 0}, " parameters: a plain stack of 2 layers."),
    ],
)
def test_a_card_says_which_loop_the_model_has(options, words):
    assert words in make_card(small_model(**options), "a").content


def test_a_card_draws_texts_where_the_tokenizer_ends_each(tmp_path):
    """A pipeline would go on after the end; without a token that begins a text, there is nothing to draw from."""
    smiles, code = (AutoTokenizer.from_pretrained(ROOT / name) for name in ("tokenization/smiles", "tokenization"))
    for tokenizer, draws in ((smiles, True), (code, False), (None, False)):
        for with_code in (True, False):
            content = make_card(small_model(), "a", tokenizer=tokenizer, with_code=with_code).content
            assert ("pipeline(" in content) != draws and ("do_sample=True, max_length=512," in content) == draws
    head = package.SpiralFormerForTokenClassification(small_config())
    assert "pipeline(" in make_card(head, "a", tokenizer=smiles).content
    assert "do_sample=True" in hub_module.build_card(tmp_path, small_model(), smiles, "me/a").content


def test_a_card_of_a_head_without_figures():
    card = make_card(package.SpiralFormerForTokenClassification(small_config(chunk_sizes=[], num_core_layers=0)), "a")
    assert card.data.pipeline_tag == "token-classification" and card.data.eval_results is None
    assert "No figures were given." in card.content and "Not stated." in card.content
    assert "| layers | 2 |" in card.content and "### Settings" not in card.content
    assert "| topology | none |" in card.content
    with pytest.raises(ValueError, match="`model` must be one of"):
        make_card(torch.nn.Linear(1, 1), "a")


# -- commits of a Trainer -----------------------------------------------------------------------------------------


class CopyingHub:
    """A Hub that is a folder, which keeps what it had and checks the digests of each commit at once."""

    def __init__(self, folder: Path):
        self.folder, self.listed = folder, []
        folder.mkdir()

    def create_repo(self, *args, **kwargs):
        return huggingface_hub.RepoUrl("me/model")

    def upload_folder(self, folder_path, path_in_repo="", ignore_patterns=(), **kwargs) -> Future:
        patterns = [ignore_patterns] if isinstance(ignore_patterns, str) else ignore_patterns
        ignored = shutil.ignore_patterns(*patterns)
        shutil.copytree(folder_path, self.folder / path_in_repo, ignore=ignored, dirs_exist_ok=True)
        check_digests(self.folder / path_in_repo, ["*"])
        self.listed.append((path_in_repo, set(read_digests(self.folder / path_in_repo))))
        (done := Future()).set_result(None)
        return done


@pytest.fixture
def copying_hub(tmp_path, monkeypatch) -> CopyingHub:
    hub = CopyingHub(tmp_path / "hub")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: hub)
    return hub


def card_trainer(folder: Path, seed: int = 0, **options) -> CardTrainer:
    """A run of two steps that pushes to the Hub."""
    tokenizer = options.pop("tokenizer", None)
    settings = {"max_steps": 2, "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    model = small_model(dtype=torch.float32, vocab_size=4096, seed=seed)
    rows = [{"input_ids": row, "labels": row} for row in random_ids(16, 8)]
    arguments = TrainingArguments(str(folder), seed=seed, **(settings | options))
    return CardTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_every_commit_has_the_digests_of_its_files(strategy, copying_hub, tmp_path):
    """Of two runs, so that the second finds the digests of the first in the repository."""
    options = {"push_to_hub": True, "hub_strategy": strategy, "hub_always_push": True}
    for seed, tokenizer in enumerate([AutoTokenizer.from_pretrained(ROOT / "tokenization"), None]):
        trainer = card_trainer(tmp_path / str(seed), seed, tokenizer=tokenizer, **options)
        trainer.train()
        trainer.push_to_hub()
        loaded = package.SpiralFormerForCausalLM.from_pretrained(copying_hub.folder)
        assert torch.equal(loaded.lm_head.weight, trainer.model.lm_head.weight)
    weights = {"config.json", "model.safetensors"}
    assert all(weights < listed for _, listed in copying_hub.listed)
    assert all({"optimizer.pt", "rng_state.pth"} < listed for path, listed in copying_hub.listed if path)
    counts = {"end": 1, "every_save": 3, "checkpoint": 5, "all_checkpoints": 5}
    assert len(copying_hub.listed) == 2 * counts[strategy]
    assert ("tokenizer.json" in copying_hub.listed[0][1]) and ("tokenizer.json" not in copying_hub.listed[-1][1])


def test_an_older_tokenizer_of_the_folder_is_gone(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenization")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    card_trainer(tmp_path, tokenizer=tokenizer).save_model()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template is None
    assert "chat_template.jinja" not in read_digests(tmp_path) and "tokenizer.json" in read_digests(tmp_path)


def test_a_push_without_training_has_the_digests_of_its_files(copying_hub, tmp_path):
    for seed in (0, 1):
        trainer = card_trainer(tmp_path / str(seed), seed)
        trainer.push_to_hub()
        loaded = package.SpiralFormerForCausalLM.from_pretrained(copying_hub.folder)
        assert torch.equal(loaded.lm_head.weight, trainer.model.lm_head.weight)
    files = {"config.json", "generation_config.json", "model.safetensors", "training_args.bin"}
    assert copying_hub.listed == [("", files)] * 2


def test_rows_of_embeddings_are_trained_on_and_counted_as_the_library_does(tmp_path):
    trainer = card_trainer(tmp_path, save_strategy="no", remove_unused_columns=False)
    rows = trainer.train_dataset
    trainer.train()
    assert trainer.state.total_flos > 0
    trainer.train_dataset = [{"inputs_embeds": torch.randn(8, 16), "labels": row["labels"]} for row in rows]
    trainer.train()
    assert trainer.state.total_flos == 0 and trainer.state.global_step == 2


# -- scripts/push.py ----------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A saved model in bfloat16 with tokenizer and figures."""
    folder = saved(tmp_path / "checkpoint", vocab_size=4096)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tokenization").save_pretrained(folder)
    (folder / "eval_results.json").write_text('{"eval_loss": 2.5, "eval_runtime": 3.0, "epoch": 1.0}')
    return folder


def arguments(checkpoint: Path, repo_id: str, *more: str) -> dict:
    words = ["--checkpoint", str(checkpoint), "--repo_id", repo_id, *more]
    return vars(HfArgumentParser(PushArguments).parse_args_into_dataclasses(words)[0])


@pytest.mark.processes
def test_every_option_of_the_script(checkpoint, hub, monkeypatch):
    monkeypatch.setattr(hub_module, "HfApi", partial(HfApi, endpoint=hub.url, token=TOKEN))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    said = {"license": "mit", "language": "en", "dataset": "me/texts", "training_data": "Old letters."}
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    push(**arguments(checkpoint, "me/s", "--private", *(f"--{name}={value}" for name, value in said.items())))
    files, repository = hub.files("me/s"), hub.repositories["me/s"]
    assert repository.private and files.keys() > CODE and b"BF16" in files["model.safetensors"][:10000]
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", ["me/texts"])
    assert "chat_template.jinja" in files
    assert "Old letters." in card.content and "| Loss | 2.5 |" in card.content and "Runtime" not in card.content

    # Weights in several files in place of one: the one that was there would be the one that loads. Templates, too.
    (checkpoint / "chat_template.jinja").unlink()
    commit = push(**arguments(checkpoint, "me/s", "--max_shard_size=60KB", "--commit_message=In shards"))
    files = hub.files("me/s")
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert "chat_template.jinja" not in files and "tokenizer.json" in files
    assert repository.messages[commit.oid] == "In shards"

    push(**arguments(checkpoint, "me/s", "--revision=other"))
    assert "model.safetensors" in hub.files("me/s", "other") and "model.safetensors" not in hub.files("me/s")

    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\nMy card.\n")
    push(**arguments(checkpoint, "me/s", "--license=apache-2.0"))
    assert hub.files("me/s")["README.md"].decode() == "---\nlicense: apache-2.0\n---\nMy card.\n"
    with pytest.raises(ValueError, match="`training_data` must be left out"):
        push(**arguments(checkpoint, "me/s", "--training_data=x"))


def test_what_cannot_be_pushed_is_refused(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"architectures": ["Another"]}))
    with pytest.raises(ValueError, match="`architectures` of .* must be one of .* got .*Another"):
        hub_module.load_checkpoint(str(checkpoint))
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_coda_layers": 2}))
    with pytest.raises(ValueError, match="lacks"):
        hub_module.load_checkpoint(str(checkpoint))
