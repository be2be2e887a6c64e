"""Run by test_releases.py under one release of transformers each: saves a checkpoint, or pulls it without the package.

python release_checkpoint.py save|pull folder [family of layers]
"""

import sys
from pathlib import Path

from without_package import hide_package

ACTION, FOLDER = sys.argv[1], Path(sys.argv[2])
if ACTION == "pull":
    hide_package()

import torch  # noqa: E402  after the package is gone
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache  # noqa: E402

IDS = torch.randint(3, 61, (3, 14), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :5], MASK[2, :3] = 0, 0
SEARCH = {"max_new_tokens": 11, "do_sample": False, "eos_token_id": None}
REMOTE = {"trust_remote_code": True}


def save() -> None:
    """Saves a model, and what it says without a cache."""
    from support import large_weights, small_config

    from modeling_spiralformer import SpiralFormerForCausalLM

    family = sys.argv[3] if len(sys.argv) > 3 else "gpt_neox"
    model = large_weights(SpiralFormerForCausalLM(small_config(layer_family=family))).double().eval()
    model.save_pretrained(FOLDER)
    logits = model(IDS, MASK, use_cache=False).logits.detach()
    tokens = model.generate(IDS, attention_mask=MASK, use_cache=False, **SEARCH)
    torch.save({"release": transformers.__version__, "logits": logits, "tokens": tokens}, FOLDER / "expected.pt")


def pull() -> None:
    """Loads it by the code that came along, and says the same with a cache, under either name of the argument."""
    expected = torch.load(FOLDER / "expected.pt")
    assert expected["release"] != transformers.__version__
    config = AutoConfig.from_pretrained(FOLDER, **REMOTE)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, **REMOTE).eval()
    assert type(model).__module__.startswith("transformers_modules.") and model.dtype == torch.float64
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            first = model(IDS[:, :9], MASK[:, :9], **{name: cache}).logits
            rest = model(IDS[:, 9:], MASK, **{name: cache}).logits
        difference = (torch.cat([first, rest], dim=1) - expected["logits"])[MASK.bool()].abs().max()
        assert difference < 1e-9, (name, difference)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(IDS, attention_mask=MASK, **options, **SEARCH), expected["tokens"]), options
    body = AutoModel.from_pretrained(FOLDER, config=config, **REMOTE).eval()
    states = body(IDS, MASK, use_cache=False).last_hidden_state
    assert (model.lm_head(states) - expected["logits"])[MASK.bool()].abs().max() < 1e-9


if __name__ == "__main__":
    {"save": save, "pull": pull}[ACTION]()
    print(ACTION, transformers.__version__)
