"""Run by test_hub.py as a machine without the package: pulls what `hub_push.py` pushed, by the code that came along.

python hub_pull.py folder
"""

import sys
from pathlib import Path

from without_package import FINDERS, PATH, hide_package

hide_package()

import pytest  # noqa: E402  after the package is gone
import torch  # noqa: E402
import transformers  # noqa: E402
from documents import blocks  # noqa: E402
from hub_snapshot import close, same, snapshot  # noqa: E402
from huggingface_hub import model_info  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402

FOLDER = Path(sys.argv[1])
SAVED = torch.load(FOLDER / "expected.pt")
EXPECTED = SAVED["expected"]
BATCH = SAVED["batch"]
REMOTE = {"trust_remote_code": True}
SEARCH = {"max_new_tokens": 20, "do_sample": False}


def check_same(model, name: str) -> None:
    assert same(snapshot(model, BATCH), EXPECTED[name]), name
    assert type(model).__module__.startswith("transformers_modules.me."), type(model)


def check_generation(model) -> None:
    """Decoding with a cache gives what decoding without one gave where the model was pushed."""
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(**BATCH, **SEARCH, **options), EXPECTED["generated"]), options
    (cached,) = {type(layer).__module__ for layer in cache_of(model).layers if hasattr(layer, "state")}
    own = f"{type(model).__module__.rpartition('.')[0]}.cache_spiralformer"
    files = [Path(sys.modules[name].__file__).parent for name in (cached, own)]
    codes = [{path.name: path.read_bytes() for path in folder.glob("*_spiralformer.py")} for folder in files]
    assert codes[0] == codes[1] and "cache_spiralformer.py" in codes[0], (
        cached
    )  # layers of the model's own version of the code


def cache_of(model):
    return model.generate(**BATCH, **SEARCH, return_dict_in_generate=True).past_key_values


def check_every_auto_class() -> None:
    tokenizer = AutoTokenizer.from_pretrained("me/lm", trust_remote_code=False)
    assert tokenizer.decode(tokenizer("def f():").input_ids) == "def f():" and tokenizer.padding_side == "left"
    assert type(tokenizer).__module__.startswith("transformers.")
    assert AutoTokenizer.from_pretrained("me/lm", **REMOTE)("a b") == tokenizer("a b")
    assert type(AutoConfig.from_pretrained("me/lm", **REMOTE)).__name__ == "SpiralFormerConfig"
    for name in (name for name in EXPECTED if name.startswith("AutoModel")):
        check_same(getattr(transformers, name).from_pretrained(f"me/{name}", **REMOTE), name)
    # A language model's body, and a head on it, by classes that the repository was not saved with.
    body = AutoModel.from_pretrained("me/lm", revision="v1", **REMOTE)
    with torch.no_grad():
        states = body(**BATCH, use_cache=False).last_hidden_state
    whole = AutoModelForCausalLM.from_pretrained("me/lm", revision="v1", **REMOTE)
    assert close(whole.lm_head(states), EXPECTED["v1"]["results"][0])
    head = transformers.AutoModelForSequenceClassification.from_pretrained("me/lm", num_labels=4, **REMOTE)
    assert head(**BATCH).logits.shape == (3, 4)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("me/config", **REMOTE), **REMOTE)
    assert type(fresh).__name__ == "SpiralFormerForCausalLM"


def check_pipelines() -> None:
    (written,) = pipeline("text-generation", "me/lm", revision="v1", **REMOTE)("def f", **SEARCH)
    assert written["generated_text"].startswith("def f") and len(written["generated_text"]) > 10
    (label,) = pipeline("text-classification", "me/AutoModelForSequenceClassification", **REMOTE)("def f")
    assert label["label"] in ("LABEL_0", "LABEL_1", "LABEL_2")


def main() -> None:
    with pytest.raises(ModuleNotFoundError, match="modeling_spiralformer"):
        import modeling_spiralformer  # noqa: F401
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained("me/lm", trust_remote_code=False)
    check_every_auto_class()
    check_pipelines()
    for text, network in blocks("docs/hub.md", "python"):
        if network and "modeling_spiralformer" not in text:
            exec(text.replace("COMMIT", model_info("me/my-spiralformer").sha), {})
    for name in ("trainer", "card-trainer"):
        check_same(AutoModelForCausalLM.from_pretrained(f"me/{name}", **REMOTE), name)
    revisions = [name for name in EXPECTED if name in ("v1", "main", "experiment") or len(name) == 40]
    assert len(revisions) == 4
    for revision in revisions:
        check_same(AutoModelForCausalLM.from_pretrained("me/lm", revision=revision, **REMOTE), revision)
    model = AutoModelForCausalLM.from_pretrained("me/lm", revision="v1", **REMOTE)
    check_generation(model)

    # Pushed again from here, it brings the code along once more.
    model.push_to_hub("me/again")
    check_same(AutoModelForCausalLM.from_pretrained("me/again", **REMOTE), "v1")

    # Another version of the code in the same process does not get in the way of this one, nor does the package.
    other = AutoModelForCausalLM.from_pretrained("me/other-code", **REMOTE)
    check_generation(other)
    check_generation(model)
    # A cache of one version of the code is not for another, but for any copy of the same version.
    with pytest.raises(ValueError, match="DynamicCache"):
        model(**BATCH, past_key_values=transformers.DynamicCache(config=other.config))
    config = AutoConfig.from_pretrained("me/again", **REMOTE)
    cached = model(**BATCH, past_key_values=transformers.DynamicCache(config=config)).logits
    assert torch.equal(cached, model(**BATCH).logits)
    sys.path[:], sys.meta_path[:] = PATH, FINDERS
    import modeling_spiralformer

    check_generation(model)
    installed = modeling_spiralformer.SpiralFormerForCausalLM.from_pretrained("me/lm", revision="v1")
    check_generation(installed)
    check_generation(model)


if __name__ == "__main__":
    main()
