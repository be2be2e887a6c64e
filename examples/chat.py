"""Answers messages with a checkpoint that has a chat template, by the library's pipeline.

    python examples/chat.py runs/spiral "What is the capital of France?"

Each message is a turn; the model sees those before it, and its own answers.
"""

import argparse

from transformers import pipeline

import modeling_spiralformer  # noqa: F401  registers the Auto classes

parser = argparse.ArgumentParser()
parser.add_argument("checkpoint", help="a checkpoint whose tokenizer has a chat template")
parser.add_argument("messages", nargs="+")
parser.add_argument("--max_new_tokens", type=int, default=60)
arguments = parser.parse_args()

generator = pipeline("text-generation", model=arguments.checkpoint)
if generator.tokenizer.chat_template is None:
    parser.error(f"the tokenizer of {arguments.checkpoint} must have a chat template, but has none")
chat: list[dict[str, str]] = []
for message in arguments.messages:
    chat.append({"role": "user", "content": message})
    chat = generator(chat, max_new_tokens=arguments.max_new_tokens, do_sample=False)[0]["generated_text"]
    print(f"> {message}\n{chat[-1]['content']}")
