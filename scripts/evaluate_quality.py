#!/usr/bin/env python
"""Quality of vanilla and speculative outputs side by side, greedy and sampled, with Hugging Face's `evaluate`.

    ./scripts/evaluate_quality                                  # the embedded pair, no network, about a minute
    ./scripts/evaluate_quality --target Qwen/Qwen3-4B --draft Qwen/Qwen3-0.6B --dtype bfloat16 --chat-template \\
        --dataset openai/gsm8k --dataset-config main --reference-column answer --metrics rouge ./my_metric

The exit code is 1 if greedy outputs differ in float32. It is also 1 if no draft was ever accepted, because then nothing
is shown. Sampled outputs follow the same distribution but are not identical. So each metric is averaged over --seeds
runs of both methods, and the difference comes with a 95 % interval (bootstrap over prompts, with both methods' values
of a prompt kept together); with fewer than 8 prompts there is no interval. An interval that contains 0 shows no
difference beyond noise. By chance, 1 metric in 20 has an interval without 0, more with fewer than about 30 prompts.
This compares quality; ./scripts/check_lossless tests whether the distributions are equal. The last line of the output
is JSON.

The draft length is constant, unless the pair file or --schedule says otherwise: the library's own schedule depends on
measured times, so two runs would draft differently.

Perplexity is computed under the target's own distribution, without logits processors. `evaluate` modules score each
continuation separately; the table shows the mean. The references of the embedded prompts are their continuations in
the standard library.
"""

import argparse
import json
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import hf_specdec
from hf_specdec.loop.schedule import SCHEDULES
from hf_specdec.pairs import SpecPair
from hf_specdec.tools import bootstrap, quality, report
from hf_specdec.tools.arguments import (
    add_pair_arguments,
    add_prompt_arguments,
    encode,
    load_pair,
    load_prompts,
    positive,
    quiet,
)

MODES = ("greedy", "sampled")
CAPTION = (
    "difference: speculative - vanilla; bootstrap over prompts; 1 in 20 intervals excludes 0 by chance\n"
    "agreement and match with vanilla: with vanilla's runs of other seeds, in both columns"
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    add_prompt_arguments(parser, prompts=40)
    add = parser.add_argument
    add("--new-tokens", type=positive, default=64, metavar="N", help="limit of new tokens (default: 64)")
    add("--seeds", type=positive, default=4, metavar="N", help="sampled runs of each method (default: 4)")
    add("--temperature", type=float, default=1.0, help="temperature of the sampled runs (default: 1.0)")
    add("--batch-size", type=positive, default=20, metavar="N", help="prompts per call (default: 20)")
    add("--gamma", type=positive, metavar="γ", help="draft length (default: the pair file's, else the library's)")
    add("--schedule", choices=SCHEDULES, help="schedule of the draft length (default: the pair file's, else constant)")
    add("--metrics", nargs="*", default=["rouge", "bleu", "sacrebleu"], metavar="NAME", help="`evaluate` modules "
        "that compare a text with its reference, by name or path (default: rouge bleu sacrebleu)")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.seeds < 2:
        parser.error(f"expected at least 2 --seeds, so that vanilla can be compared with itself, got {args.seeds}")
    return args


def drafting(args: argparse.Namespace, pair: SpecPair) -> dict[str, Any]:
    """Drafting options from the command line, else the pair file, else a constant draft length."""
    given = {"num_assistant_tokens": args.gamma, "num_assistant_tokens_schedule": args.schedule}
    given = {name: value for name, value in given.items() if value is not None}
    return {"num_assistant_tokens_schedule": "constant", **pair.config.recommended, **given}


def measure(
    mode: str, args: argparse.Namespace, pair: SpecPair, batches: list[quality.Batch], console: Console
) -> tuple[list[quality.Run], list[quality.Run], hf_specdec.SpeculationStats]:
    """Vanilla and speculative runs, taking turns, and the speculation statistics."""
    sampling = {"do_sample": True, "temperature": args.temperature} if mode == "sampled" else {"do_sample": False}
    options = sampling | {"max_new_tokens": args.new_tokens}
    stats = hf_specdec.SpeculationStats()
    spec = {"assistant_model": pair.draft, "strategy": "spec", "speculation_stats": stats, **drafting(args, pair)}
    methods = {"vanilla": options, "speculative": options | spec}
    count = args.seeds if mode == "sampled" else 1
    runs: dict[str, list[quality.Run]] = {name: [] for name in methods}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"generating, {mode}", total=count * len(methods))
        for seed in range(count):
            for own, (name, chosen) in enumerate(methods.items()):
                # With one seed both methods would share their first random numbers, and not be independent.
                runs[name].append(quality.generate(pair.target, batches, 2 * seed + own, **chosen))
                progress.advance(task)
    return runs["vanilla"], runs["speculative"], stats


def show(
    console: Console, title: str, figures: dict[str, dict[str, Any]], missing: dict[str, str], sampled: bool
) -> None:
    intervals = any("interval" in row for row in figures.values())
    table = Table("metric", title=title, title_justify="left", padding=(0, 0, 0, 1))
    for heading in "vanilla", "speculative", "difference, 95 % interval" if intervals else "difference":
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for name, row in figures.items():
        difference = f"{row['difference']:+.3f}"
        if "interval" in row:
            low, high = row["interval"]
            difference += f" [{low:+.3f}, {high:+.3f}]"
            verdict = Text("contains 0", "green") if row["contains_0"] else Text("excludes 0", "yellow")
        elif sampled:
            verdict = Text("too few prompts", "dim")
        else:
            verdict = Text("identical", "green") if row["equal"] else Text("differs", "bold red")
        table.add_row(name, f"{row['vanilla']:.3f}", f"{row['speculative']:.3f}", Text(difference), verdict)
    for name in missing:
        table.add_row(name, "-", "-", "-", Text("not available", "dim"))
    captions = [CAPTION] if intervals else []
    if sampled and not all("interval" in row for row in figures.values()):
        captions.append(f"no interval with fewer than {bootstrap.LEAST} prompts: it would be too narrow")
    table.caption, table.caption_justify = "\n".join(captions), "left"
    console.print(report.fitted(table))


def show_acceptance(console: Console, accepted: dict[str, Any]) -> None:
    positions = ", ".join(f"{rate:.2f}" for rate in accepted["acceptance_by_position"])
    interval = ""
    if "acceptance_rate_interval" in accepted:
        interval = " (95 % interval {:.3f} to {:.3f})".format(*accepted["acceptance_rate_interval"])
    console.print(
        f"acceptance rate α = {accepted['acceptance_rate']:.3f}{interval}, "
        f"block efficiency τ = {accepted['block_efficiency']:.2f}; drafts accepted by position: {positions}\n"
    )


def find_failures(result: dict[str, Any]) -> list[str]:
    """Evidence against equal quality, and reasons why this run did not show it."""
    failures = []
    for mode in MODES:
        accepted = result[mode]["acceptance"]
        if not accepted["accepted_tokens"]:
            what = f"none of {accepted['drafted_tokens']} drafts was accepted"
            what = what if accepted["drafted_tokens"] else "nothing was ever drafted"
            failures.append(f"{mode}: {what}, so nothing is shown: check that target and draft fit")
    if result["dtype"] == "float32" and not result["identical"]:
        failures.append("Greedy outputs differ, which in float32 is a bug: see ./scripts/check_lossless.")
    return failures


def main(arguments: list[str] | None = None) -> int:
    args, console = parse(arguments), Console(highlight=False)
    quiet()
    pair = load_pair(args)
    prompts = load_prompts(args, pair.tokenizer)
    if len(prompts) < 2:
        raise SystemExit(f"expected at least 2 prompts to resample, got {len(prompts)}")
    if args.dataset is None:
        prompts = quality.with_true_continuations(prompts, pair.tokenizer, args.new_tokens)
    references = sum(map(quality.has_reference, prompts))
    groups = [prompts[i : i + args.batch_size] for i in range(0, len(prompts), args.batch_size)]
    batches = [encode(group, pair.tokenizer, pair.target.device) for group in groups]
    agreement = quality.load_metric("token_agreement")
    metrics, missing = quality.load_text_metrics(args.metrics if references > 1 else [])

    result: dict[str, Any] = {**vars(args), "dtype": str(pair.target.dtype).removeprefix("torch.")}
    result |= {"prompts": len(prompts), "references": references, "not_available": missing}
    for mode in MODES:
        vanilla, speculative, stats = measure(mode, args, pair, batches, console)
        if mode == "greedy":
            result["identical"] = vanilla == speculative
        with console.status(f"scoring, {mode}"):
            comparisons = quality.compare_runs(vanilla, speculative, agreement)
            comparisons.append(quality.compare_perplexity(pair.target, batches, vanilla, speculative))
            if references > 1:
                comparisons += quality.compare_with_references(
                    prompts, vanilla, speculative, pair.tokenizer, agreement, metrics
                )
            figures = {comparison.name: comparison.to_dict(mode == "sampled") for comparison in comparisons}
            accepted = quality.acceptance(stats)
        if len(prompts) < bootstrap.LEAST:
            del accepted["acceptance_rate_interval"]
        title = f"{mode}, {len(prompts)} prompts, runs per method: {len(vanilla)}"
        show(console, title, figures, missing, mode == "sampled")
        show_acceptance(console, accepted)
        result[mode] = {"metrics": figures, "acceptance": accepted}

    for name, why in missing.items():
        console.print(f"{name} is not available ({why})")
    if references < len(prompts):
        console.print(f"{references} of {len(prompts)} prompts have a reference; comparing needs at least 2.")
    if not result["identical"] and result["dtype"] != "float32":
        console.print(f"Greedy outputs differ, as near-ties may in {result['dtype']}: see ./scripts/check_lossless.")
    failures = find_failures(result)
    for failure in failures:
        console.print(Text(failure, "bold red"))
    print(json.dumps(result | {"failures": failures}))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
