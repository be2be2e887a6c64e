"""Quantises a trained model to int8 weights with torchao, on a CPU, and says what that does to its perplexity.

    python examples/quantise.py runs/quickstart runs/quantised

The quantised model is saved, loaded again as any other checkpoint, and continues a prompt. The held-out text is the
source of the Python standard library, or `--validation_file`.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

from checkpoints import load_config, load_model, load_tokenizer
from files import check_folder
from torchao.quantization import Int8WeightOnlyConfig
from training_arguments import DataArguments
from training_data import make_blocks
from transformers import AutoModelForCausalLM, TorchAoConfig

parser = argparse.ArgumentParser()
parser.add_argument("model", help="checkpoint with a tokenizer, a folder or a name on the Hub")
parser.add_argument("output_dir")
parser.add_argument("--keep", nargs="*", default=["lm_head"], help="modules that stay as they are")
parser.add_argument(
    "--dtype",
    default="float32",
    choices=["float32", "bfloat16", "float16"],
    help="of everything that is not quantised",
)
parser.add_argument("--prompt", default="def __init__(self")
parser.add_argument("--block_size", type=int, default=128)
parser.add_argument("--max_eval_samples", type=int, default=64)
parser.add_argument("--validation_file", help="text to measure on; default: held-out files of the standard library")
arguments = parser.parse_args()

if check_folder("output_dir", arguments.output_dir).resolve() == Path(arguments.model).resolve():
    parser.error("output_dir must be another folder than that of the model")
sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
config = load_config(arguments.model, field="model")
tokenizer = load_tokenizer(arguments.model, config, field="model")
data = DataArguments(validation_file=arguments.validation_file, max_eval_samples=arguments.max_eval_samples)
blocks = make_blocks(data, tokenizer, arguments.block_size, ["validation"])["validation"].with_format("torch")


@torch.no_grad()
def perplexity(model: torch.nn.Module) -> float:
    losses = [model(**block, use_cache=False).loss.item() for block in blocks.iter(batch_size=8)]
    return math.exp(sum(losses) / len(losses))


def weights_in_mib(folder: str) -> float:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 2**20


model = load_model(arguments.model, config, dtype=getattr(torch, arguments.dtype))
before = perplexity(model)
quantisation = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=arguments.keep)
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype, quantization_config=quantisation)
model.save_pretrained(arguments.output_dir)
tokenizer.save_pretrained(arguments.output_dir)

model = AutoModelForCausalLM.from_pretrained(arguments.output_dir)
after = perplexity(model)
prompt = tokenizer(arguments.prompt, return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]))
print(f"perplexity: {before:.3f} before, {after:.3f} after ({after / before - 1:+.3%})")
print(f"weights: {weights_in_mib(arguments.output_dir):.2f} MiB in {arguments.output_dir}")
