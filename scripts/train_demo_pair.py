#!/usr/bin/env python
"""Train the demo pair from scratch: a tokenizer, a small target and a distilled draft, on Python's standard library.

Every machine that runs Python has the text, so nothing is downloaded. The draft learns the target's distribution on the
corpus and on continuations written by the target, because agreement on the target's own text is what counts.

    python scripts/train_demo_pair.py                     # everything, about 45 minutes on two cores
    python scripts/train_demo_pair.py --skip-target       # keep the saved target, train the draft again
    python scripts/train_demo_pair.py --smoke             # a tiny run of every step, in a temporary folder

The last line of the output is JSON with every measured figure; the card, README.md, shows the same figures.
"""

import argparse
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from hf_specdec.pairs.compatibility import vocabulary_check
from hf_specdec.pairs.pair_file import PairConfig
from hf_specdec.tools.distillation import distillation_loss, first_layers, standard_library
from hf_specdec.tools.recipe import optimizers
from hf_specdec.tools.stdlib import HELD_OUT, STDLIB

Llama, FastTokenizer = transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
GAMMA = 4  # draft length of the acceptance figures
PROMPT_TOKENS, NEW_TOKENS = 100, 100  # of each held-out prompt when acceptance is measured

# At this size a layer costs its Python overhead, so the target is deep and narrow and the draft has two layers,
# the fewest that can copy from the context (induction). Equal widths let the draft start from the target's weights.
SHAPE_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
TARGET_SHAPE = (192, 352, 18, 6, 2)
DRAFT_LAYERS = 2
SMOKE_SHAPE = (32, 64, 2, 2, 1)


def train_tokenizer(texts: list[str], vocab_size: int) -> FastTokenizer:
    """Byte-level BPE: decoding restores any text unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END, PAD], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return FastTokenizer(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, padding_side="left",
        clean_up_tokenization_spaces=False, model_max_length=2048,
    )  # fmt: skip


def pack(documents: Dataset, tokenizer: FastTokenizer, length: int, seed: int) -> torch.Tensor:
    """Tokenise, put the end token around the documents and cut the stream into blocks `[blocks, length]`."""

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer([END + text for text in batch["text"]], verbose=False)["input_ids"]}

    rows = documents.shuffle(seed=seed).map(tokenise, batched=True, remove_columns=["text"])["input_ids"]
    stream = torch.tensor([token for row in rows for token in row])
    return stream[: len(stream) // length * length].view(-1, length)


def held_out_prompts(tokenizer: FastTokenizer, count: int, tokens: int = 128) -> list[dict[str, str]]:
    """Cut prompts that begin at a `def` or `class` line, evenly spaced over the held-out modules."""
    names = [name for name in HELD_OUT if (STDLIB / name).exists()]
    per_module, found = -(-count // len(names)), []
    for name in names:
        source = (STDLIB / name).read_text(encoding="utf-8", errors="replace")
        starts = [match.start() for match in re.finditer(r"^ *(?:def|class) ", source, re.MULTILINE)]
        ids = [tokenizer(source[at : at + 10 * tokens])["input_ids"][:tokens] for at in starts]
        texts = [tokenizer.decode(each) for each in ids[:: len(ids) // (per_module + 1) or 1]]
        long = [text for text in texts if text.isascii() and len(tokenizer(text)["input_ids"]) >= PROMPT_TOKENS]
        found += [{"module": name, "text": text} for text in long[:per_module]]
    return found[:count]


def new_model(shape: tuple[int, ...], tokenizer: FastTokenizer) -> Llama:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = dict(zip(SHAPE_FIELDS, shape, strict=True), vocab_size=len(tokenizer), max_position_embeddings=2048)
    model = Llama(transformers.LlamaConfig(**sizes, **ids, tie_word_embeddings=True))
    model.generation_config.do_sample = False
    return model


def optimise(model: Llama, steps: int, lr: float, next_loss: Callable[[], torch.Tensor], what: str) -> float:
    """Take `steps` steps, with a warm-up, then linear decay to zero; return the seconds they took."""
    began = time.perf_counter()
    chosen = optimizers(model.train(), lr, "muon", decay=0.0)
    warm_up = min(60, steps // 10 + 1)
    schedules = [transformers.get_linear_schedule_with_warmup(each, warm_up, steps) for each in chosen]
    smooth = None
    for _ in (bar := tqdm(range(steps), desc=what, mininterval=5)):
        loss = next_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*chosen, *schedules):
            each.step()
        model.zero_grad()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
    model.eval()
    return time.perf_counter() - began


def batches(blocks: torch.Tensor, rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield the block numbers of each batch, in a new order for every epoch, endlessly."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(len(blocks), generator=generator).split(rows)


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of `tokens[:, 1:]`, with equal weight for every token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def train_target(model: Llama, blocks: torch.Tensor, steps: int, lr: float, rows: int, seed: int) -> float:
    chosen = batches(blocks, rows, seed)

    def loss() -> torch.Tensor:
        tokens = blocks[next(chosen)]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(tokens, use_cache=False).logits
        return next_token_loss(logits, tokens)

    return optimise(model, steps, lr, loss, "target")


class Lesson:
    """Blocks of text with the target's last hidden states, so its logits at any position cost one small product."""

    @torch.inference_mode()
    def __init__(self, name: str, weight: float, target: Llama, blocks: torch.Tensor, rows: int) -> None:
        self.weight, self.blocks, self.batches = weight, blocks, batches(blocks, rows, seed=0)
        self.head = target.lm_head.weight.detach()
        parts = tqdm(blocks.split(rows), desc=f"target reads {name}", mininterval=5)
        with torch.autocast("cpu", torch.bfloat16):
            states = [target.model(part, use_cache=False).last_hidden_state.half() for part in parts]
        self.states = torch.cat(states)  # [blocks, length, hidden]

    def loss(self, draft: Llama, argmax_weight: float) -> torch.Tensor:
        """KL(target || draft) plus cross-entropy on the target's argmax, the mean over tokens."""
        chosen = next(self.batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = draft(self.blocks[chosen], use_cache=False).logits
        p_logits = self.states[chosen].float().flatten(0, 1) @ self.head.T
        return distillation_loss(logits.flatten(0, 1), p_logits, argmax_weight)


@torch.inference_mode()
def continuations(model: Llama, prompts: torch.Tensor, new: int, sample: bool) -> torch.Tensor:
    """Continue every row by `new` tokens, greedily or by sampling; returns `[rows, prompt + new]`."""
    cache, tokens, fed = transformers.DynamicCache(config=model.config), prompts, prompts
    for _ in tqdm(range(new), desc="target writes", mininterval=5):
        logits = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        fed = torch.multinomial(logits.softmax(-1), 1) if sample else logits.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, fed], dim=1)
    return tokens


def on_policy_blocks(target: Llama, corpus: torch.Tensor, rows: int, sample: bool) -> torch.Tensor:
    """Let the target continue prompts of 96 tokens, from anywhere in the training text, to 256 tokens."""
    starts = torch.randint(0, corpus.numel() - 96, (rows, 1))
    prompts = corpus.flatten()[starts + torch.arange(96)]
    return torch.cat([continuations(target, part, 160, sample) for part in prompts.split(256)])


def train_draft(draft: Llama, lessons: list[Lesson], args: argparse.Namespace) -> float:
    """Distil: each step draws one lesson, with probability proportional to its weight."""
    weights = torch.tensor([lesson.weight for lesson in lessons])

    def loss() -> torch.Tensor:
        return lessons[int(torch.multinomial(weights, 1))].loss(draft, args.argmax_weight)

    return optimise(draft, args.draft_steps, args.draft_lr, loss, "draft")


@torch.inference_mode()
def describe(folder: Path, model: Llama, heldout: torch.Tensor) -> dict[str, Any]:
    """The training figures, the sizes and the held-out loss."""
    sums = [next_token_loss(model(part, use_cache=False).logits, part).item() * len(part) for part in heldout.split(8)]
    sizes = {"layers": model.config.num_hidden_layers, "width": model.config.hidden_size}
    training = json.loads((folder / "training.json").read_text())
    return {**training, **sizes, "parameters": model.num_parameters(), "heldout_loss": sum(sums) / len(heldout)}


@torch.inference_mode()
def agreement(target: Llama, draft: Llama, prompts: torch.Tensor, new: int) -> dict[str, Any]:
    """How often the draft's argmax is the target's on the target's own greedy text, and the resulting blocks."""
    greedy = continuations(target, prompts, new, sample=False)
    start = prompts.shape[1]
    guesses = draft(greedy, use_cache=False).logits[:, start - 1 : -1].argmax(-1)
    same = guesses == greedy[:, start:]
    accepted = [k for row in same.tolist() for k in accepted_per_block(row)]
    by_position = [sum(k > i for k in accepted) / len(accepted) for i in range(GAMMA)]
    sampled = continuations(target, prompts, new, sample=True)
    p, q = (model(sampled, use_cache=False).logits[:, start - 1 : -1].softmax(-1) for model in (target, draft))
    fours = [{tuple(row[i : i + 4]) for i in range(new - 3)} for row in greedy[:, start:].tolist()]
    return {
        "repeated_4_grams": 1 - sum(map(len, fours)) / (len(fours) * (new - 3)),
        "greedy_token_agreement": same.float().mean().item(),
        "acceptance_rate": sum(accepted) / (GAMMA * len(accepted)),
        "block_efficiency": sum(accepted) / len(accepted) + 1,
        "acceptance_by_position": by_position,
        "sampling_overlap": torch.minimum(p, q).sum(-1).mean().item(),
    }


def accepted_per_block(same: list[bool]) -> list[int]:
    """Walk one row in blocks of GAMMA proposals: k agreements in a row are accepted, then the target adds a token."""
    found, at = [], 0
    while at < len(same):
        block = same[at : at + GAMMA]
        found.append(block.index(False) if False in block else len(block))
        at += found[-1] + 1
    return found


@torch.inference_mode()
def forward_ms(networks: dict[str, Llama], context: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median time of a one-token forward with a filled cache; the models take turns."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    caches = {name: model(context, use_cache=True).past_key_values for name, model in networks.items()}
    for _ in range(repeats):
        for name, model in networks.items():
            began = time.perf_counter()
            model(context[:, -1:], past_key_values=caches[name], use_cache=True)
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def ship(model: Llama, tokenizer: FastTokenizer, folder: Path, **training: Any) -> None:
    """Save in bfloat16, with the tokenizer and the training figures."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(training))


def load(folder: Path) -> Llama:
    if not (folder / "model.safetensors").exists():
        raise SystemExit(f"Expected a model in {folder}, found none; train it first, without --skip-target.")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: code
tags: [speculative-decoding, python, draft-model, llama]
---
# The embedded demo pair of hf_specdec

`target/` and `draft/` are two small Llama models with one tokenizer, trained together by `scripts/train_demo_pair.py`,
which also wrote this card. They write text that looks like Python but is not working code: use them to try
speculative decoding without a network. They were trained on contexts of up to {block} tokens.

| | target | draft |
|---|---|---|
| parameters | {target[parameters]:,} | {draft[parameters]:,} |
| layers x width | {target[layers]} x {target[width]} | {draft[layers]} x {draft[width]} |
| held-out loss (nats per token) | {target[heldout_loss]:.3f} | {draft[heldout_loss]:.3f} |
| one-token forward, float32, {threads} threads | {target[forward_ms]:.2f} ms | {draft[forward_ms]:.2f} ms |
| training steps, peak learning rate | {target[steps]}, {target[lr]} | {draft[steps]}, {draft[lr]} |
| training time | {target[seconds]:.0f} s | {draft[seconds]:.0f} s + {draft[writing_seconds]:.0f} s of writing |

Forward time ratio: **{cost_ratio:.3f}**.

**Acceptance**, γ = {gamma}, {prompts} held-out prompts of {prompt_tokens} tokens, {new_tokens} new tokens, greedy:
α = **{acceptance_rate:.3f}**, τ = {block_efficiency:.2f} tokens per target forward; drafts 1 to {gamma} are accepted in
{positions} of the blocks; the draft's choice equals the target's at {greedy_token_agreement:.3f} of the tokens.
When sampling at temperature 1, a draft token would be accepted with probability {sampling_overlap:.3f}.
Such a small target repeats itself in greedy text ({repeated_4_grams:.0%} of its 4-grams), which is easy to draft.

**Data**: the sources of Python {python}'s standard library (PSF license), {modules} modules, {train_bytes:,} bytes,
{train_tokens:,} tokens. Held out from tokenizer and models ({heldout_tokens:,} tokens): {held_out_names}.
`heldout_prompts.jsonl` has prompts cut from these.

**Recipe**: seed {seed}; Muon for matrices, AdamW for embeddings and norms, warm-up then linear decay to zero, clipping
at 1, bfloat16 autocast. Target: {rows} x {block} tokens per step, next-token loss. Draft: starts as the target's
embeddings, first {draft[layers]} layers and final norm, then learns KL(target || draft) plus {draft[argmax_weight]} x
cross-entropy on the target's choice, against the target as shipped (rounded to bfloat16), twice the tokens per
step, from one kind of text: corpus, greedy or sampled continuations ({draft[continuations]} greedy ones), drawn with
weights {draft[lesson_weights]}.

**Machine**: {cpu}, torch {torch}, {date}. Times are wall clock; other work may have run on the machine.
"""


def write_card(output: Path, figures: dict[str, Any]) -> None:
    positions = ", ".join(f"{rate:.3f}" for rate in figures["acceptance_by_position"])
    names = ", ".join(f"`{name}`" for name in HELD_OUT)
    (output / "README.md").write_text(CARD.format(**figures, positions=positions, held_out_names=names))


def make_target(args: argparse.Namespace, docs: DatasetDict) -> None:
    """Train tokenizer and target; save both with the training figures."""
    tokenizer = train_tokenizer(docs["train"]["text"], 512 if args.smoke else 4096)
    blocks = pack(docs["train"], tokenizer, args.block, args.seed)
    model = new_model(SMOKE_SHAPE if args.smoke else TARGET_SHAPE, tokenizer)
    seconds = train_target(model, blocks, args.target_steps, args.target_lr, args.rows, args.seed)
    ship(model, tokenizer, args.output / "target", steps=args.target_steps, lr=args.target_lr, seconds=seconds)


def make_draft(args: argparse.Namespace, target: Llama, tokenizer: FastTokenizer, blocks: torch.Tensor) -> None:
    """Let the target write and process the lessons, train the draft on them, save it like the target."""
    began = time.perf_counter()
    lessons = make_lessons(args, target, blocks)
    writing_seconds = time.perf_counter() - began
    draft = first_layers(target, 1 if args.smoke else DRAFT_LAYERS)
    seconds = train_draft(draft, lessons, args)
    recipe = {name: getattr(args, name) for name in ("continuations", "lesson_weights", "argmax_weight")}
    training = {"steps": args.draft_steps, "lr": args.draft_lr, "seconds": seconds, "writing_seconds": writing_seconds}
    ship(draft, tokenizer, args.output / "draft", **training, **recipe)
    PairConfig(tokenizer=vocabulary_check(tokenizer)).save(args.output)


def make_lessons(args: argparse.Namespace, target: Llama, blocks: torch.Tensor) -> list[Lesson]:
    """Part of the corpus, and the target's greedy and sampled continuations of it; all with equal tokens per batch."""
    texts = {"corpus": blocks[: args.continuations]}
    texts["greedy"] = on_policy_blocks(target, blocks, args.continuations, sample=False)
    texts["sampled"] = on_policy_blocks(target, blocks, args.continuations // 3, sample=True)
    tokens = 2 * args.rows * args.block
    weighted = zip(texts.items(), args.lesson_weights, strict=True)
    return [Lesson(name, weight, target, text, tokens // text.shape[1]) for (name, text), weight in weighted]


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    docs = standard_library(40 if args.smoke else None)
    if not (args.skip_target or args.skip_draft):
        make_target(args, docs)
    target, tokenizer = load(args.output / "target"), transformers.AutoTokenizer.from_pretrained(args.output / "target")
    blocks, heldout = (pack(docs[split], tokenizer, args.block, args.seed) for split in ("train", "heldout"))
    if not args.skip_draft:
        make_draft(args, target, tokenizer, blocks)
    draft = load(args.output / "draft")

    prompts = held_out_prompts(tokenizer, args.prompts)
    (args.output / "heldout_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    ids = torch.tensor([tokenizer(row["text"])["input_ids"][:PROMPT_TOKENS] for row in prompts])
    ms = forward_ms({"target": target, "draft": draft}, ids[:1], 10 if args.smoke else 200)
    texts = docs["train"]["text"]
    figures = {
        **agreement(target, draft, ids, NEW_TOKENS),
        "cost_ratio": ms["draft"] / ms["target"],
        "target": {**describe(args.output / "target", target, heldout), "forward_ms": ms["target"]},
        "draft": {**describe(args.output / "draft", draft, heldout), "forward_ms": ms["draft"]},
        "gamma": GAMMA, "prompts": len(prompts), "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS,
        "modules": len(texts), "train_bytes": sum(len(text.encode()) for text in texts), "train_tokens": blocks.numel(),
        "heldout_tokens": heldout.numel(), "seed": args.seed, "rows": args.rows, "block": args.block,
        "date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "cpu": f"{os.cpu_count()} cores ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
        "python": platform.python_version(),
    }  # fmt: skip
    write_card(args.output, figures)
    print(json.dumps(figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent.parent / "hf_specdec" / "assets" / "demo_pair"
    add = parser.add_argument
    add("--output", type=Path, default=default, help=f"folder of target/, draft/ and the card (default: {default})")
    add("--skip-target", action="store_true", help="reuse the tokenizer and the target saved in --output")
    add("--skip-draft", action="store_true", help="also reuse the saved draft: only measure again and rewrite the card")
    add("--smoke", action="store_true", help="tiny models, few steps, temporary folder: tests the script in a minute")
    add("--seed", type=int, default=0, help="seed of the initial weights, the order and the samples (default: 0)")
    add("--block", type=int, default=512, help="tokens per training block (default: 512)")
    add("--rows", type=int, default=4, help="blocks per step of the target; the draft takes twice as many (default: 4)")
    add("--target-steps", type=int, default=1700, help="training steps of the target (default: 1700)")
    add("--target-lr", type=float, default=0.01, help="peak learning rate of the target (default: 0.01)")
    add("--draft-steps", type=int, default=1300, help="training steps of the draft (default: 1300)")
    add("--draft-lr", type=float, default=0.005, help="peak learning rate of the draft (default: 0.005)")
    add("--continuations", type=int, default=3072, help="greedy continuations the target writes (default: 3072)")
    add("--lesson-weights", type=float, nargs=3, default=[0.25, 0.6, 0.15], metavar=("CORPUS", "GREEDY", "SAMPLED"),
        help="how often the draft learns from each kind of text (default: 0.25 0.6 0.15)")  # fmt: skip
    add(
        "--argmax-weight", type=float, default=0.6, help="weight of cross-entropy on the target's choice (default: 0.6)"
    )
    add("--prompts", type=int, default=60, help="held-out prompts to save and measure with (default: 60)")
    args = parser.parse_args()
    if args.smoke:
        args.output = Path(tempfile.mkdtemp(prefix="demo_pair_"))
        args.target_steps = args.draft_steps = 4
        args.block, args.continuations, args.prompts = 64, 8, 4
    return args


if __name__ == "__main__":
    main(parse())
