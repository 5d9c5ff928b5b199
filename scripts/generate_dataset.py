#!/usr/bin/env python
"""Generate a text for each row of a dataset; the same command goes on where it was interrupted.

    ./scripts/generate_dataset --dataset prompts.jsonl --output texts.jsonl        # the embedded pair
    ./scripts/generate_dataset --target Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B --dtype bfloat16 \\
        --dataset openai/gsm8k --dataset-config main --split test --column question --chat-template \\
        --output answers.parquet
    torchrun --nproc-per-node 2 scripts/generate_dataset.py --dataset ...          # each process its share

It is the command `hf-specdec generate`. The last line of the output is JSON.
"""

import argparse

from hf_specdec.tools.generate_dataset import add_arguments, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    try:
        run(parse(arguments))
    except (OSError, ValueError) as error:
        raise SystemExit(f"generate_dataset: {error}") from error


if __name__ == "__main__":
    main()
