"""Measures how far bfloat16, float16 and float32 are from float64, level by level, over depth and length.

python scripts/compare_dtypes.py --checkpoints checkpoints/spiralformer-155k
"""

from transformers import HfArgumentParser

from workshop.numerics import NumericsArguments, format_table, measure


def main(argv: list[str] | None = None) -> list[dict]:
    (arguments,) = HfArgumentParser(NumericsArguments).parse_args_into_dataclasses(argv)
    found = measure(arguments)
    print(format_table(found))
    return found


if __name__ == "__main__":
    main()
