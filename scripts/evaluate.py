"""Evaluates a causal language model: perplexity and bits per byte of text files, and LAMBADA, in one table.

    python scripts/evaluate.py --model_name_or_path runs/quickstart --text_files text.txt --window 512 --stride 256

This file has the name of the `evaluate` library, which every script of this folder would find here first. So an
`import evaluate` of this file hands over to the library: the module that the importer gets is the library's.
"""

import sys

if __name__ == "__main__":
    from evaluation import main

    main(sys.argv[1:])
else:
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    here = Path(__file__).resolve().parent
    elsewhere = [folder for folder in sys.path if Path(folder).resolve() != here]
    spec = PathFinder.find_spec(__name__, elsewhere)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)
    # A module may replace itself while it is imported: the import system returns what stands here at the end.
    sys.modules[__name__] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
