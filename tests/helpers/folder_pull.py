"""Run by test_hub.py as a machine without the package: loads what lies in folders, by the code that lies beside it.

python folder_pull.py folder
"""

import sys
from pathlib import Path

from without_package import hide_package

FOLDER = Path(sys.argv[1])
hide_package()

import torch  # noqa: E402  after the package is gone
import transformers  # noqa: E402
from hub_snapshot import same, snapshot  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402
from transformers.utils import logging  # noqa: E402

REMOTE = {"trust_remote_code": True}
EXPECTED = torch.load(FOLDER / "expected.pt")
IDS = EXPECTED.pop("ids")


class Kept(list):
    """What a logger says."""

    def write(self, text: str) -> None:
        self.append(text)

    def flush(self) -> None:
        """Nothing is held back."""


def check_every_auto_class() -> None:
    for name, expected in EXPECTED.items():
        auto_class = getattr(transformers, name.partition("_")[0])
        model, report = auto_class.from_pretrained(FOLDER / name, output_loading_info=True, **REMOTE)
        assert not any(report.values()), (name, report)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        assert same(snapshot(model.eval(), {"input_ids": IDS}), expected), name
        fresh = auto_class.from_config(AutoConfig.from_pretrained(FOLDER / name, **REMOTE), **REMOTE)
        assert [weight.shape for weight in fresh.parameters()] == [weight.shape for weight in model.parameters()]
    config = AutoConfig.from_pretrained(FOLDER / "config", **REMOTE)
    assert AutoModelForCausalLM.from_config(config, **REMOTE).config.hidden_size == 16
    # A head on a body that was saved by another class.
    for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        auto_class = getattr(transformers, f"AutoModelFor{head}")
        assert auto_class.from_pretrained(FOLDER / "AutoModelForCausalLM", **REMOTE)(IDS)[0].shape[0] == len(IDS)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "AutoModelForCausalLM_by_Trainer", **REMOTE)
    assert tokenizer.decode(tokenizer("def f():").input_ids) == "def f():"


def check_names() -> None:
    """`Trainer` knows the class as a language model; PEFT, which `Trainer` loads, is not loaded for its lists."""
    assert "peft" not in sys.modules
    from transformers import Trainer, TrainingArguments

    assert "SpiralFormerForCausalLM" in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "AutoModelForCausalLM", **REMOTE).eval()
    options = {"report_to": "none", "use_cpu": True, "label_smoothing_factor": 1e-9}
    trainer = Trainer(model, TrainingArguments(str(FOLDER / "out"), **options))
    found = trainer.compute_loss(model, {"input_ids": IDS, "labels": IDS})
    assert abs(found - model(IDS, labels=IDS).loss) < 1e-5


def check_faults_are_named() -> None:
    said = Kept()
    logging.disable_default_handler()
    logging.add_handler(handler := logging.logging.StreamHandler(said))
    path = FOLDER / "config" / "config.json"
    whole = path.read_text()
    for fault, named in (('"hiden_size"', "`hiden_size`"), ('"other"', "`hidden_size` is missing")):
        path.write_text(
            whole.replace('"hidden_size"', fault).replace('"num_attention_heads": 2', '"num_attention_heads": 12')
        )
        AutoConfig.from_pretrained(FOLDER / "config", **REMOTE)
        assert named in "".join(said), said
    path.write_text(whole)
    said.clear()
    AutoConfig.from_pretrained(FOLDER / "config", **REMOTE)
    assert not said
    logging.remove_handler(handler)


if __name__ == "__main__":
    check_every_auto_class()
    check_names()
    check_faults_are_named()
    print("loaded", len(EXPECTED))
