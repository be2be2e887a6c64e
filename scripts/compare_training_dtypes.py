"""Trains one model in float32, in float32 with bfloat16 layers, and in bfloat16, and compares the losses.

python scripts/compare_training_dtypes.py --train_file train.txt --validation_file valid.txt
"""

from transformers import HfArgumentParser

from workshop.training_dtypes import TrainingDtypesArguments, compare, format_table


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    (arguments,) = HfArgumentParser(TrainingDtypesArguments).parse_args_into_dataclasses(argv)
    found = compare(arguments)
    print(format_table(found))
    return found


if __name__ == "__main__":
    main()
