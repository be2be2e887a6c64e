"""Packaging of SpiralFormer for Hugging Face Transformers."""

from pathlib import Path

from setuptools import setup

setup(
    name="spiralformer",
    version="0.1.0",
    description="SpiralFormer, a looped Transformer with one core pass per resolution, for Hugging Face Transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=["modeling_spiralformer"],
    python_requires=">=3.11",
    install_requires=["transformers>=5.17,<6", "torch", "safetensors"],
    extras_require={
        "train": ["accelerate", "datasets", "evaluate", "peft", "trl"],
        "eval": ["evaluate", "lm-eval[hf]"],
        "molecules": ["rdkit", "scipy"],
        "dev": [
            "hypothesis",
            "matplotlib",
            "pytest",
            "pytest-xdist",
            "pyyaml",
            "ruff",
            "scipy",
            "tokenizers",
            "torchao",
            "transformers-mlinter",
            "transformers[serving]",
        ],
    },
)
