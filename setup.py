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
    # The published configurations and the tokenizer lie beside the package here, and inside it in a wheel.
    packages=["modeling_spiralformer", "modeling_spiralformer.configuration", "modeling_spiralformer.tokenization"],
    package_dir={
        "modeling_spiralformer.configuration": "configuration",
        "modeling_spiralformer.tokenization": "tokenization",
    },
    package_data={
        "modeling_spiralformer.configuration": ["*/config.json"],
        "modeling_spiralformer.tokenization": ["*.json", "smiles/*.json", "README.md"],
    },
    python_requires=">=3.11",
    # Bounds are what the tests run on: a lower one is the version of constraints.txt (for transformers, that of `make
    # test-min`), an upper one excludes the next minor release. Upper ones stand where the model builds on what such a
    # release may change: the library's own classes, and what PEFT and TRL do to layers.
    install_requires=["transformers>=5.17,<5.25", "torch>=2.13", "huggingface_hub", "safetensors"],
    # The commands that these extras are for are in scripts/ of the source tree; a wheel holds none. What they import
    # stands here by name: a package that another one brings along today may be dropped by it.
    extras_require={
        "train": [
            "accelerate>=1.15",
            "datasets",
            "evaluate",
            "filelock",
            "matplotlib",
            "numpy",
            "pandas",
            "peft>=0.21,<0.22",
            "pyarrow",
            "pyyaml",
            "scipy",
            "tokenizers",
            "tqdm",
            "trl>=1.16,<1.17",
        ],
        "eval": ["evaluate", "lm-eval[hf]>=0.4.13"],
        "molecules": ["fcd", "rdkit", "scipy", "torchao"],
        "dev": [
            "codespell",
            "hypothesis",
            "mypy",
            "pre-commit",
            "pytest",
            "pytest-xdist",
            "ruff",
            "setuptools",
            "torchao",
            "transformers-mlinter",
            "transformers[serving]",
        ],
    },
)
