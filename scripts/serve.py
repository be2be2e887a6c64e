"""`transformers serve` for a SpiralFormer checkpoint: the library's own server and options, the model known to it.

    python scripts/serve.py my_model --port 8000

The server imports no package of ours, and looks the class that a checkpoint names up among the library's own names
alone, also with --trust-remote-code. So this file imports the package, puts the class there and starts the server.
With --continuous-batching each request has its own sampling settings and stop strings (`workshop.serving`).
"""

import sys

from transformers.cli.serving import model_manager, utils
from transformers.cli.transformers import app

from workshop.serving import RequestBatching, ServedModel


def main(argv: list[str]) -> None:
    # The name `transformers` as the server has it: the library may put another module object in its place.
    model_manager.transformers.SpiralFormerForCausalLM = ServedModel
    utils.CBGenerateManager = RequestBatching
    app(["serve", *argv])


if __name__ == "__main__":
    main(sys.argv[1:])
