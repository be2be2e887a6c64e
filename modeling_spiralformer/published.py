"""Where the published configurations and the tokenizer are: inside the package in a wheel, beside it in a checkout."""

from pathlib import Path

from .configuration_spiralformer import refuse

PACKAGE = Path(__file__).resolve().parent
HOME = PACKAGE if (PACKAGE / "configuration").is_dir() else PACKAGE.parent
TOKENIZER_FOLDER = HOME / "tokenization"


def configuration_folder(name: str) -> Path:
    """The folder of a published configuration, such as "spiralformer-b-mesh-160m", or of "tiny".

    `from_pretrained` takes it, wherever the package is installed. Raises ValueError for another name.
    """
    known = sorted(path.parent.name for path in HOME.glob("configuration/*/config.json"))
    if name not in known:
        refuse("name", name, f"one of {known}")
    return HOME / "configuration" / name
