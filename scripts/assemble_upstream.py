"""Writes the package as it would stand in transformers, `models/spiralformer/`, and prints what mlinter finds there.

python scripts/assemble_upstream.py --output_dir runs/upstream
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from workshop.files import check_folder
from workshop.upstream import assemble, lint


@dataclass
class UpstreamArguments:
    """Where to write."""

    output_dir: str = field(
        metadata={"help": "Folder that gets models/spiralformer/, such as src/transformers of a checkout."}
    )


def main(arguments: UpstreamArguments) -> Path:
    folder = assemble(check_folder("output_dir", arguments.output_dir))
    print(f"Wrote {', '.join(sorted(path.name for path in folder.glob('*.py')))} to {folder}")
    findings = lint(folder)
    for finding in findings:
        print(f"{Path(finding['path']).name}:{finding['line']}: {finding['message']}")
    print(f"mlinter: {len(findings)} findings")
    return folder


if __name__ == "__main__":
    main(*HfArgumentParser(UpstreamArguments).parse_args_into_dataclasses())
