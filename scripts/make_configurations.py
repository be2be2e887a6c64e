"""Writes `configuration/<name>/config.json`: the published models, `tiny` and `tiny-llama`, from one table."""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from workshop.files import ROOT, check_folder
from workshop.published import all_configs, to_json

CONFIGURATION_FOLDER = ROOT / "configuration"


@dataclass
class OutputArguments:
    """Where to write."""

    output_dir: str = field(
        default=str(CONFIGURATION_FOLDER), metadata={"help": "Folder that gets one folder per model."}
    )


def main(output_dir: str):
    configs = all_configs()
    folder = check_folder("output_dir", output_dir, [f"{name}/config.json" for name in configs])
    for name, config in configs.items():
        path = folder / name / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(config), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(OutputArguments).parse_args_into_dataclasses()
    main(arguments.output_dir)
