#!/usr/bin/env python
"""Many prompts of different lengths: generate_many against static batches, with and without speculation.

    ./scripts/benchmark_many                            # the embedded pair, 300 prompts, no network
    ./scripts/benchmark_many --batch-size 4 --prompts 60

Prompts are the first 5 to 100 tokens of held-out texts. How many new tokens each gets is drawn from a lognormal
distribution, and no text ends before. Methods take turns on parts of the prompts, and the table has the median over
parts of the ratio to vanilla. Static batches take prompts as they come; "sorted" ones by how many new tokens they get,
which nobody knows in advance. The last line of the output is JSON.
"""

import argparse
import json

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hf_specdec.tools.arguments import add_pair_arguments, add_prompt_arguments, load_pair, load_prompts, quiet
from hf_specdec.tools.refill import compare_ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    add_prompt_arguments(parser, prompts=300, prompt_tokens=100)
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="texts at a time (default: 16)")
    parser.add_argument("--median", type=int, default=40, help="median number of new tokens (default: 40)")
    parser.add_argument("--sigma", type=float, default=0.8, help="of the lognormal distribution (default: 0.8)")
    parser.add_argument("--gamma", type=int, metavar="N", help="constant draft length (default: the default schedule)")
    parser.add_argument("--parts", type=int, default=5, metavar="N", help="parts of the prompts (default: 5)")
    args = parser.parse_args()
    quiet()
    pair = load_pair(args)
    texts = [prompt.text for prompt in load_prompts(args, pair.tokenizer)]
    options = {} if args.gamma is None else {"num_assistant_tokens": args.gamma}
    lengths = (args.median, args.sigma)
    found = compare_ways(pair, texts, args.prompts, args.batch_size, lengths, args.parts, options)

    table = Table("", "target forwards", "tokens/s", "against vanilla", box=SIMPLE_HEAD)
    for name, way in found["ways"].items():
        table.add_row(name, str(way["forwards"]), f"{way['tokens_per_second']:.0f}", f"{way['ratio']:.2f}x")
    console = Console()
    console.print(table)
    console.print(
        f"{found['tokens']} tokens; admission and results take {found['host_share']:.1%} of generate_many's time, "
        f"of that preparing calls {found['prepare_share']:.1%}; reading new prompts makes an iteration "
        f"{found['reading_ratio']:.2f} times as long (median; {found['doubled_share']:.1%} take more than twice "
        f"as long); acceptance {found['acceptance_rate']:.0%}; "
        f"{found['differing']} texts differ from vanilla's"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
