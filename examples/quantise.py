"""Quantises a trained model to int8 or int4 weights with torchao, on a CPU, and says what that does to its perplexity.

    python examples/quantise.py runs/quickstart runs/quantised --text text.txt
    python examples/quantise.py runs/quickstart runs/quantised --text text.txt --bits 4

The quantised model is saved, loaded again as any other checkpoint, and continues a prompt. Perplexity is that of the
first blocks of the text.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

import modeling_spiralformer  # noqa: F401  registers the Auto classes

parser = argparse.ArgumentParser()
parser.add_argument("model", help="checkpoint with a tokenizer, a folder or a name on the Hub")
parser.add_argument("output_dir")
parser.add_argument("--text", required=True, help="a text file to measure on, which the model was not trained on")
parser.add_argument("--keep", nargs="*", default=["lm_head"], help="modules that stay as they are")
parser.add_argument(
    "--dtype",
    default="float32",
    choices=["float32", "bfloat16", "float16"],
    help="of everything that is not quantised",
)
parser.add_argument("--bits", type=int, default=8, choices=[8, 4], help="of a weight, with one scale a row")
parser.add_argument("--prompt", default="def __init__(self")
parser.add_argument("--block_size", type=int, default=128)
parser.add_argument("--max_blocks", type=int, default=64)
arguments = parser.parse_args()

if Path(arguments.output_dir).resolve() == Path(arguments.model).resolve():
    parser.error("output_dir must be another folder than that of the model")
sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
tokenizer = AutoTokenizer.from_pretrained(arguments.model)
text = tokenizer(Path(arguments.text).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)
ids = torch.tensor(text["input_ids"])
count = min(len(ids) // arguments.block_size, arguments.max_blocks)
if not count:
    parser.error(f"--text must hold a block of {arguments.block_size} tokens, but {arguments.text} has {len(ids)}")
blocks = ids[: count * arguments.block_size].view(count, arguments.block_size)


@torch.no_grad()
def perplexity(model: torch.nn.Module) -> float:
    losses = [model(block[None], labels=block[None], use_cache=False).loss.item() for block in blocks]
    return math.exp(sum(losses) / len(losses))


def weights_in_mib(folder: str) -> float:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 2**20


model, loading = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype, output_loading_info=True)
if any(loading.values()):  # the library would draw or drop these weights, and warn
    parser.error(f"model must hold the weights of its configuration, but loading it gave {loading}")
before = perplexity(model)
# torchao's int4 kernels need an accelerator; these weights are int4 in their values, each in a byte, on every device.
weights = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0))
weights = weights if arguments.bits == 4 else Int8WeightOnlyConfig()
quantisation = TorchAoConfig(weights, modules_to_not_convert=arguments.keep)
model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype, quantization_config=quantisation)
model.save_pretrained(arguments.output_dir)
tokenizer.save_pretrained(arguments.output_dir)

model = AutoModelForCausalLM.from_pretrained(arguments.output_dir)
after = perplexity(model)
prompt = tokenizer(arguments.prompt, return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]))
print(f"perplexity: {before:.3f} before, {after:.3f} after ({after / before - 1:+.3%})")
print(f"weights: {weights_in_mib(arguments.output_dir):.2f} MiB in {arguments.output_dir}")
