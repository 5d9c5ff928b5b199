#!/usr/bin/env python
"""Check that speculation changes nothing: greedy outputs token by token, sampled ones by seed or by a two-sample test.

    ./scripts/check_lossless                       # the embedded pair in float32, no network, about a minute
    ./scripts/check_lossless --dtype bfloat16      # near-ties may fall differently, as in transformers
    ./scripts/check_lossless --target Qwen/Qwen3-4B --draft Qwen/Qwen3-0.6B --dtype bfloat16 --prompts 20

Greedy: vanilla generate() and speculation decode every prompt, for each draft length γ with the draft model and once by
prompt look-up, in batches of each size. The first difference of a row from vanilla is

  a tie   if each path chose the best token of its own scores, and two quantities are within a bound: the gap between
          the two tokens, summed over both paths, and the difference between the paths' logits up to there. The bound is
          the larger of two units in the last place of the dtype, and twice the noise: the difference between vanilla's
          logits and those of one plain forward of the target that is expected at one of ten times as many positions
          (measured without speculation);
  a BUG   otherwise. Rows with the same tokens are BUGs too if their logits differ by more than the bound.

Sampled with the same seeds (`speculation_acceptance="coupled"`): vanilla chooses its tokens with the noise of a seed,
and so does speculation. Their texts are compared in the same way.

Sampled: continuations of four tokens are drawn both ways. A chi-squared test compares each token, and each pair of
adjacent tokens. The table shows how large a bias (total variation) the test finds with a probability of 90%. The null
hypothesis allows for rounding, again measured between vanilla and a plain forward.

float32 is the strictest check, because almost nothing counts as a tie. The exit code is 1 if there is a BUG, if the
samples differ (by chance once in 1000 runs), or if no draft was ever accepted, because then nothing is shown. Ties do
not fail. The last line of the output is JSON.
"""

import argparse
import functools
import json
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hf_specdec.tools.arguments import (
    add_pair_arguments,
    add_prompt_arguments,
    load_pair,
    load_prompts,
    positive,
    quiet,
)
from hf_specdec.tools.lossless import BUG, IDENTICAL, TokenResult, Way, check_tokens
from hf_specdec.tools.report import fitted
from hf_specdec.tools.two_sample import ALARM, NEW_TOKENS, POWER, PROMPT_TOKENS, ROWS, SampledResult, check_sampled

SAMPLED_PROMPTS = 4
SHOWN = 20  # divergences in the table; the JSON has all
LEFT: dict[str, Any] = {"title_justify": "left", "caption_justify": "left", "box": SIMPLE_HEAD}


def show_tokens(console: Console, title: str, results: list[TokenResult]) -> None:
    table = Table("speculation", title=f"{title}, compared with vanilla", **LEFT)
    for heading in ("batch", "rows", "same", "ties", "BUGs", "α", "τ", "off by"):
        table.add_column(heading, justify="right")
    for result in results:
        r = result.to_dict()
        table.add_row(
            str(result.way),
            *(str(r[name]) for name in ("batch_size", "rows", "identical", "ties")),
            Text(str(r["bugs"]), "bold red" if r["bugs"] else "green"),
            f"{r['acceptance_rate']:.3f}",
            f"{r['block_efficiency']:.2f}",
            f"{r['deviation']:.2g}",
        )
    lines = ["off by: the largest difference from vanilla's logits"]
    for size, r in {result.way.batch_size: result for result in results}.items():
        found = r.rounding.differences
        lines.append(
            f"batch {size}: at {len(found)} positions plain forwards differ by at most {max(found):.2g}; at ten times "
            f"as many, by an expected {r.rounding.noise:.2g}. So gaps up to {r.bound:.2g} can be ties "
            f"({r.near_ties:.1%} of positions have such a gap)"
        )
    table.caption = "\n".join(lines)
    console.print(fitted(table))


def show_divergences(console: Console, results: list[TokenResult], tokenizer: PreTrainedTokenizerBase) -> None:
    found = [(result.way, *verdict) for result in results for verdict in result.verdicts() if verdict[1] != IDENTICAL]
    if not found:
        return
    found.sort(key=lambda entry: entry[2] != BUG)
    table = Table("speculation", title="rows that differ", **LEFT)
    for heading in ("batch", "prompt", "token", "vanilla", "here", "gaps", "verdict"):
        table.add_column(heading, justify="right" if heading in ("batch", "prompt", "token") else "left")

    def shown(token: int | None) -> Text:
        return Text("-" if token is None else repr(tokenizer.decode([token])))

    for way, comparison, verdict, why in found[:SHOWN]:
        table.add_row(
            str(way),
            *(str(value or "-") for value in (way.batch_size, comparison.prompt, comparison.position)),
            *(shown(token) for token in comparison.tokens),
            "-" if comparison.gaps is None else "{:.2g}, {:.2g}".format(*comparison.gaps),
            Text(f"{verdict}: {why}", "bold red") if verdict == BUG else verdict,
        )
    lines = ["token: the first new token that differs; gaps: how much vanilla and speculation each prefer their own"]
    if len(found) > SHOWN:
        lines.append(f"{len(found) - SHOWN} more rows are in the JSON below")
    table.caption = "\n".join(lines)
    console.print(fitted(table))


def show_sampled(console: Console, results: list[SampledResult]) -> None:
    table = Table("compared", title=f"sampled, {results[0].samples} continuations each way", **LEFT)
    for result in results:
        table.add_column(f"{result.way}: p", justify="right")
        table.add_column("finds", justify="right")
    for i, first in enumerate(results[0].views):
        cells: list[str | Text] = []
        for result in results:
            view = result.views[i]
            cells.append(Text(f"{view.p_value:.2g}", "bold red" if view.p_value < ALARM / result.tests else ""))
            cells.append("-" if view.detectable is None else f"{view.detectable:.1%}")
        table.add_row(first.name, *cells)
    rates = [f"{r.way}: α = {r.stats.acceptance_rate:.3f}, τ = {r.stats.block_efficiency:.2f}" for r in results]
    table.caption = (
        f"p below {ALARM / results[0].tests:.2g} ({ALARM:g} / {results[0].tests} tests) is a difference\n"
        f"finds: bias (total variation) found with probability {POWER:g}\n" + "; ".join(rates)
    )
    console.print(fitted(table))


def find_failures(compared: list[TokenResult], sampled: list[SampledResult]) -> list[str]:
    """Evidence against losslessness, and reasons why this run did not show it."""
    bugs = sum(verdict == BUG for result in compared for _, verdict, _ in result.verdicts())
    failures = [f"{bugs} rows differ by more than rounding explains"] if bugs else []
    failures += [f"samples differ: {r.way}, p = {r.p_value:.2g}" for r in sampled if r.differs]
    if not any(result.stats.accepted_tokens for result in [*compared, *sampled]):
        failures.append("no draft was ever accepted, so nothing is shown: check that target and draft fit")
    return failures


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    add_prompt_arguments(parser, prompts=12, prompt_tokens=None)
    add = parser.add_argument_group("check").add_argument
    add("--new-tokens", type=positive, default=64, help="tokens to generate greedily per prompt (default: 64)")
    add("--gamma", type=positive, nargs="+", default=[1, 4, 8], metavar="γ", help="draft lengths (default: 1 4 8)")
    add("--batch-size", type=positive, nargs="+", default=[1, 4], metavar="N", help="prompts per batch (default: 1 4)")
    add("--samples", type=int, default=1000, metavar="N",
        help=f"continuations drawn for each of {SAMPLED_PROMPTS} prompts (their first {PROMPT_TOKENS} tokens), "
        f"a multiple of {ROWS}; 0 for none (default: 1000)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    args = parser.parse_args(arguments)
    if args.samples < 0 or args.samples % ROWS:
        parser.error(f"expected --samples as a multiple of {ROWS}, got {args.samples}")
    return args


def main(arguments: list[str] | None = None) -> int:
    args, console = parse(arguments), Console(highlight=False)
    quiet()
    torch.manual_seed(args.seed)
    pair = load_pair(args)
    prompts = load_prompts(args, pair.tokenizer)
    gammas = sorted(set(args.gamma))
    drafts = [("model", gamma) for gamma in gammas] + [("look-up", gammas[-1])]
    ways = [Way(*draft, size) for size in sorted(set(args.batch_size)) for draft in drafts]
    sampled_ways = [Way(drafter, NEW_TOKENS - 1) for drafter in ("model", "look-up")] if args.samples else []
    sampled_prompts = prompts[:: -(-len(prompts) // SAMPLED_PROMPTS)] if args.samples else []

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("greedy", total=sum(-(-len(prompts) // way.batch_size) for way in ways))
        greedy = check_tokens(pair, prompts, ways, args.new_tokens, lambda: progress.advance(task))
        coupled_ways = [way for way in ways if way.gamma == gammas[-1]] if args.samples else []
        task = progress.add_task("seeds", total=sum(-(-len(prompts) // way.batch_size) for way in coupled_ways))
        advance = functools.partial(progress.advance, task)
        coupled = check_tokens(pair, prompts, coupled_ways, args.new_tokens, advance, args.seed)
        task = progress.add_task("sampled", total=len(sampled_prompts) * args.samples // ROWS * (len(sampled_ways) + 1))
        sampled = check_sampled(pair, sampled_prompts, sampled_ways, args.samples, lambda: progress.advance(task))

    for title, results in (("greedy", greedy), ("sampled with the same seeds", coupled)):
        if results:
            show_tokens(console, title, results)
            show_divergences(console, results, pair.tokenizer)
    if sampled:
        show_sampled(console, sampled)
    failures = find_failures([*greedy, *coupled], sampled)
    for failure in failures:
        console.print(Text(failure, "bold red"))
    result = vars(args) | {"device": str(pair.target.device), "dtype": str(pair.target.dtype).removeprefix("torch.")}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "transformers": transformers.__version__}
    result |= {"greedy": [r.to_dict() for r in greedy], "coupled": [r.to_dict() for r in coupled]}
    result |= {"sampled": [r.to_dict() for r in sampled]}
    print(json.dumps(result | {"failures": failures, "lossless": not failures}))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
