"""`./scripts/demo --real`: a small chat model answers six prompts; every method is compared on each of them."""

import statistics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafters.heads import Eagle3Head
from ..pairs.pair import SpecPair
from ..records.trace import STYLES
from . import methods
from .bare import BareForwards
from .chat_prompts import PATTERNS
from .conversation import Conversation
from .measure import ASSISTED, OURS, Batch, Comparison, Method, Record
from .report import fitted
from .summary import ideal
from .surroundings import cpu_name, instruction_set
from .terminal_chat import Screen
from .texts import prompt_ids

PROMPTS = tuple(PATTERNS["demo"].items())  # by category; none is among the prompts that the head was trained on


def show(
    console: Console,
    target: PreTrainedModel,
    head: Eagle3Head,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """Stream the answers, then show what each method takes for them.

    Returns: figures by method; `identical` says whether no token of any method differs from vanilla's.
    """
    answer(console, SpecPair(target, head, tokenizer), new_tokens)
    prompts = [torch.tensor([prompt_ids(text, tokenizer, True, None)], device=target.device) for _, text in PROMPTS]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in prompts]
    chosen = [
        methods.vanilla(),
        methods.assisted_lookup(4),
        Method("HF, this head", ASSISTED, lambda: {"assistant_model": head}),
        Method("ours, this head", OURS, lambda: {"strategy": "spec", "assistant_model": head}),
        *(methods.ours(head, {}, "", drafter=name) for name in ("lookup", "suffix")),
    ]
    bare = BareForwards(target, head)
    records = compare(console, target, chosen, batches, new_tokens, rounds, bare)
    figures = {name: _figures(record, records[chosen[0].name], bare) for name, record in records.items()}
    _print_speed(console, figures, records[chosen[0].name])
    identical = not any(record.differing for record in records.values())
    return {"methods": figures, "bare": bare.to_dict(), "instruction_set": instruction_set(), "identical": identical}


def answer(console: Console, pair: SpecPair, new_tokens: int) -> None:
    """Stream an answer to each prompt, with accepted drafts in colour."""
    conversation = Conversation(pair, {"assistant_model": pair.draft}, {"do_sample": False}, new_tokens)
    conversation.warm_up()
    console.print(Text.assemble("Accepted drafts look ", ("like this", STYLES["accepted"]), "."))
    for category, text in PROMPTS:
        console.print()
        console.print(Text(text, "bold"), soft_wrap=True)
        conversation.reset()
        screen = Screen(conversation, console)
        turn = conversation.ask(text, screen.tell)
        screen.end()
        stats = turn.stats
        told = f"{category}: α {stats.acceptance_rate:.2f}, τ {stats.block_efficiency:.2f}, "
        console.print(Text(told + f"{turn.tokens_per_second:.1f} tokens/s", "dim"))


def compare(
    console: Console,
    target: PreTrainedModel,
    chosen: list[Method],
    batches: list[Batch],
    new_tokens: int,
    rounds: int,
    bare: BareForwards,
) -> dict[str, Record]:
    """The methods' measurements; they take turns, prompt by prompt, with the bare forwards."""
    with console.status("measuring") as status:
        comparison = Comparison(
            target, chosen, batches, new_tokens, bare, advance=lambda name: status.update(f"measuring {name}")
        )
        comparison.warm_up()
        for _ in range(rounds):
            comparison.round()
    return comparison.records


def _figures(record: Record, vanilla: Record, bare: BareForwards) -> dict[str, Any]:
    if record.refusal:
        return {"refused": record.refusal}
    by_prompt = [
        statistics.median(
            theirs[index].seconds / mine[index].seconds for theirs, mine in zip(vanilla.rounds, record.rounds)
        )
        for index in range(len(PROMPTS))
    ]
    stats = record.stats
    best = ideal(record, bare) if stats.target_forwards else None
    return {
        "speedup": round(statistics.mean(by_prompt), 3),
        "by_prompt": {category: round(ratio, 3) for (category, _), ratio in zip(PROMPTS, by_prompt)},
        "acceptance_rate": round(stats.acceptance_rate, 4) if stats.drafted_tokens else None,
        "block_efficiency": round(stats.block_efficiency, 3) if stats.drafted_tokens else None,
        "ideal": None if best is None else round(best, 3),
        "forwards": sum(run.forwards for run in record.rounds[-1]),
        "differing_rows": sorted(record.differing),
    }


def _print_speed(console: Console, figures: dict[str, dict[str, Any]], vanilla: Record) -> None:
    """Speed-ups by prompt, and what the methods did on all of them."""
    seconds = [statistics.median(run[index].seconds for run in vanilla.rounds) for index in range(len(PROMPTS))]
    speed = sum(map(len, vanilla.rows)) / sum(seconds)
    title = f"Speed-up over vanilla generate(), which makes {speed:.1f} tokens/s"
    caption = (
        "The ideal is the speed-up at this τ if only the forwards took time, as transformers makes them; ours may be "
        f"faster, with packed weights. {cpu_name()}, {instruction_set()}, {torch.get_num_threads()} threads, float32."
    )
    known = {name: found for name, found in figures.items() if "refused" not in found}
    table = Table("prompt", title=title, title_justify="left", caption=caption, caption_justify="left")
    for name in known:
        table.add_column("\n".join(name.split()), justify="right")  # so that they fit into 80 columns
    for category, _ in PROMPTS:
        table.add_row(category, *(f"{found['by_prompt'][category]:.2f}x" for found in known.values()))
    table.add_section()
    table.add_row("mean", *(f"{found['speedup']:.2f}x" for found in known.values()))
    for label, key, unit in ("ideal", "ideal", "x"), ("α", "acceptance_rate", ""), ("τ", "block_efficiency", ""):
        table.add_row(label, *("-" if found[key] is None else f"{found[key]:.2f}{unit}" for found in known.values()))
    table.add_row("target forwards", *(str(found["forwards"]) for found in known.values()))
    same = [
        Text("differ", "bold red") if found["differing_rows"] else Text("same", "green") for found in known.values()
    ]
    table.add_row("tokens", *same)
    console.print()
    console.print(fitted(table))
    for name, found in figures.items():
        if "refused" in found:
            console.print(Text(f"{name}: {found['refused']}", "dim"))


def load(console: Console, dtype: torch.dtype) -> tuple[PreTrainedModel, Eagle3Head, PreTrainedTokenizerBase] | None:
    """The real pair; `None`, after saying why, if it cannot be had."""
    from .smollm2 import smollm2_pair

    try:
        with console.status("loading SmolLM2-135M-Instruct; the first time it is downloaded and converted"):
            return smollm2_pair(dtype)
    except (ImportError, OSError) as error:
        console.print(Text(f"SmolLM2 cannot be had here: {error}", "yellow"))
        return None
