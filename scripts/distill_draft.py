#!/usr/bin/env python
"""Train a draft for a target on your text, and show the gain: acceptance on held-out prompts, before and after.

    ./scripts/distill_draft                                # the embedded target, a draft of its first 2 layers
    ./scripts/distill_draft --target Qwen/Qwen3-8B --from-layers 4 --dataset my.jsonl --output my-pair
    ./scripts/distill_draft --target Qwen/Qwen3-8B --draft Qwen/Qwen3-0.6B --dataset my.jsonl --output my-pair
    ./scripts/distill_draft --target Qwen/Qwen3-8B --head eagle3 --draft-vocab-size 32000 --dataset my.jsonl
    ./scripts/distill_draft --parallel                     # one that predicts several tokens in one forward (PARD)
    ./scripts/distill_draft --output my-pair --resume      # after Ctrl-C, with its original settings

The target continues pieces of the text, greedily and by sampling. On these and on the text itself, the draft learns the
target's distribution (KL, after Zhou et al. 2024, DistillSpec, arXiv:2310.08461). The output folder is a pair:
draft/ and specdec_pair.json, which names the target. Its folder training/ keeps what a resumed run needs. With --head
it is a head on the target's hidden states instead, in the format of speculators: pass it as `assistant_model`.

--dataset is the text, by default the sources of Python's standard library. From a Hub dataset the split `train` is
used, unless --split names another. --prompts pieces of the text (by default the embedded pair's) are held out from
training to measure acceptance. --prompt-tokens is the length of these, and of the prompts that the target continues.
With --chat-template each text is a user message: its first --prompt-tokens tokens are put into the template, which
stays whole, so that the target always answers.

The exit code is 1 if greedy acceptance on the held-out prompts did not rise, 130 after Ctrl-C. The last line of the
output is JSON.
"""

import argparse
import dataclasses
import json
import logging
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_specdec.drafters.heads import Eagle3Head
from hf_specdec.drafters.heads.saving import save_folder
from hf_specdec.drafters.parallel import mask_token
from hf_specdec.pairs import DEMO_PAIR, SpecPair
from hf_specdec.pairs.loading import find_pair, load_model, load_tokenizer, pin
from hf_specdec.pairs.pair_file import FILE_NAME, ModelReference
from hf_specdec.tools import distillation, head_training, parallel_distillation, report
from hf_specdec.tools.arguments import (
    DTYPES,
    add_pair_arguments,
    add_prompt_arguments,
    load_pair,
    load_prompts,
    positive,
    quiet,
)
from hf_specdec.tools.progress import progress
from hf_specdec.tools.recipe import Recipe
from hf_specdec.tools.tuning import pair_file_for

FREE = {"output", "resume", "threads", "device"}  # settings that a resumed run may change
RUN = Path("training", "run.json")  # in the output folder
Tokens = list[list[int]]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_pair_arguments(parser)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--from-layers", type=positive, metavar="K", help="start from the target's embeddings, first K "
        "layers and head, instead of a draft model (default for the embedded target: 2)")  # fmt: skip
    start.add_argument("--random", type=positive, metavar="K", help="start from K layers with random weights")
    start.add_argument("--head", choices=("eagle3",), help="train a head on the target's hidden states instead")
    parser.add_argument("--draft-vocab-size", type=positive, metavar="N",
        help="the head proposes only the N tokens that the target writes most often (default: all)")  # fmt: skip
    parser.add_argument("--mlp-width", type=positive, metavar="N", help="width of the head's MLP (default: the "
        "target's); with --draft-vocab-size it makes a head small")  # fmt: skip
    parser.add_argument("--share-output", action="store_true", help="the head uses the target's output weights, "
        "which are not trained and not saved; hf_specdec reads such heads, other engines do not")  # fmt: skip
    add_prompt_arguments(parser, prompts=24, prompt_tokens=64)
    parser.set_defaults(split="train")
    add = parser.add_argument_group("training").add_argument
    add("--output", type=Path, metavar="FOLDER", help="folder for the pair (default: a new temporary folder)")
    add("--resume", action="store_true", help="resume the unfinished run in --output")
    add("--parallel", action="store_true", help="train a draft that predicts several tokens in one forward, by mask "
        "tokens (PARD); needed for one that does so already")  # fmt: skip
    add("--steps", type=positive, default=300, help="updates of the draft (default: 300)")
    add("--rows", type=positive, default=4, help="examples per forward (default: 4)")
    add("--accumulate", type=positive, default=1, metavar="N", help="forwards per step (default: 1)")
    add("--lr", type=float, help="peak learning rate (default: 1 / hidden size of the draft, which is 0.005 for the "
        "embedded pair; use less to fine-tune a good draft)")  # fmt: skip
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon (PyTorch 2.9) is for the matrices "
        "between embeddings and output (default: adamw)")  # fmt: skip
    add("--argmax-weight", type=float, default=0.5, metavar="W",
        help="weight of cross-entropy on the target's choice, for greedy use (default: 0.5)")  # fmt: skip
    add("--completion-only-loss", action="store_true", help="train on the target's continuations, not on the prompts")
    add("--examples", type=positive, default=320, metavar="N",
        help="number of text pieces, and of each kind of continuation (default: 320)")  # fmt: skip
    add("--block-tokens", type=positive, default=256, metavar="N", help="longest piece of text, without "
        "--chat-template (default: 256)")  # fmt: skip
    add("--new-tokens", type=positive, default=96, metavar="N", help="longest continuation (default: 96)")
    add("--temperature", type=float, default=1.0, metavar="T", help="of all sampling (default: 1.0)")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help="for the forwards (default: no)")
    add("--checkpoint-every", type=positive, default=100, metavar="N",
        help="steps between checkpoints and acceptance measurements (default: 100)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of random weights, data and order (default: 0)")
    return parser


def parse() -> argparse.Namespace:
    """The arguments. A resumed run takes the first run's arguments as defaults and may not change them."""
    its = parser()
    args = its.parse_args()
    if not args.resume:
        if args.output is not None and args.output.exists():
            its.error(f"--output {args.output} exists: give a new folder, or add --resume to continue a run")
        args.output = args.output or Path(tempfile.mkdtemp(prefix="distilled-"))
        return args
    if args.output is None:
        its.error("expected --output with --resume, got none: the folder of the run to resume")
    stored = read_run(args.output)["settings"]
    if (args.output / (FILE_NAME if stored.get("head") is None else "config.json")).exists():
        its.error(f"the run in {args.output} is finished: train its pair further with --pair {args.output}")
    its.set_defaults(**stored)
    args = its.parse_args()
    changed = [f"{name} was {stored[name]!r}, now {value!r}" for name, value in settings(args).items()
        if value != stored.get(name, value)]  # fmt: skip
    if changed:
        its.error(f"a resumed run keeps its settings, but {'; '.join(changed)}")
    return args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in FREE}


def read_run(folder: Path) -> dict[str, Any]:
    path = folder / RUN
    if not path.is_file():
        raise SystemExit(f"expected an unfinished run in {folder}, found no {path}")
    return json.loads(path.read_text(encoding="utf-8"))


def write_run(folder: Path, run: dict[str, Any]) -> None:
    path = folder / RUN
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(run, indent=2), encoding="utf-8")
    unfinished.replace(path)


def load_start(args: argparse.Namespace) -> SpecPair:
    """The target with the initial draft."""
    if args.draft_vocab_size is not None and args.head is None:
        raise ValueError("expected --head with --draft-vocab-size, got none: a draft model has the target's vocabulary")
    if args.mlp_width is not None and args.head is None:
        raise ValueError("expected --head with --mlp-width, got none: a draft model keeps the target's layers")
    if args.share_output and args.head is None:
        raise ValueError("expected --head with --share-output, got none: a draft model has output weights of its own")
    layers = args.from_layers or (None if args.pair or args.target or args.head else 2)
    if args.random is None and layers is None and args.head is None:
        pair = load_pair(args)
        if pair.has_two_tokenizers:
            raise ValueError(
                "the draft has another tokenizer than the target, whose distribution it would learn: begin with a "
                "draft that shares it, or with --from-layers"
            )
        return pair
    if args.draft is not None or (args.pair and args.target):
        raise ValueError(
            "expected --pair or --target with one of --draft, --from-layers, --random and --head, got several"
        )
    name = args.pair or args.target or str(DEMO_PAIR)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"dtype": DTYPES[args.dtype], "device_map": device, "trust_remote_code": args.trust_remote_code}
    found = find_pair(name, args.revision, roles=("target",), **options)
    reference = found.target if found else ModelReference(name, args.revision)
    source = pin(dataclasses.replace(reference, gguf_file=args.gguf_file or reference.gguf_file), **options)
    target = load_model(source, **options)
    if args.head is not None:
        draft = make_head(args, target)
    elif args.random is not None:
        draft = distillation.random_layers(target, args.random)
    else:
        draft = distillation.first_layers(target, layers)
    return SpecPair(target, draft, load_tokenizer(source, **options), sources=(source, source))


def make_head(args: argparse.Namespace, target: PreTrainedModel, ids: torch.Tensor | None = None) -> Eagle3Head:
    """A new head; `ids` are the tokens that it can propose, all if None."""
    return head_training.new_head(target, ids, mlp_width=args.mlp_width, shares_output=args.share_output)


def read_text(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens, Tokens]:
    """Pieces of text to train on, and held-out prompts."""
    if args.chat_template and args.dataset is None:
        raise ValueError("expected --dataset with --chat-template, got none: the default text is not a conversation")
    special = {"add_special_tokens": not args.chat_template}  # a chat template has already added them
    if args.dataset is None:
        documents = distillation.standard_library()["train"]["text"]
        training = distillation.cut(list(documents), tokenizer, args.block_tokens, **special)
        prompts = [prompt.text for prompt in load_prompts(args, tokenizer)]
        held = [ids[: args.prompt_tokens] for ids in tokenizer(prompts, **special)["input_ids"]]
        return training, held
    path = Path(args.dataset)
    if path.is_file() and path.suffix == ".txt" and not args.chat_template:
        documents = [path.read_text(encoding="utf-8")]  # its lines are not separate texts
    else:
        length = args.prompt_tokens if args.chat_template else None
        everything = argparse.Namespace(**vars(args) | {"prompts": sys.maxsize, "prompt_tokens": length})
        documents = [prompt.text for prompt in load_prompts(everything, tokenizer)]
    if args.chat_template:  # shortened before the template was applied; cutting now would lose the assistant's turn
        return distillation.hold_out(tokenizer(documents, **special)["input_ids"], args.prompts)
    training, held = distillation.hold_out(
        distillation.cut(documents, tokenizer, args.block_tokens, **special), args.prompts
    )
    return training, [piece[: args.prompt_tokens] for piece in held]


class Run:
    """One training run and its folder."""

    def __init__(self, args: argparse.Namespace, console: Console) -> None:
        self.args, self.console, self.folder = args, console, args.output / "training"
        self.start = load_start(args)
        if args.parallel:
            parallel_distillation.add_mask_token(self.start.draft, self.start.tokenizer)
        elif mask_token(self.start.draft) is not None:
            raise ValueError(
                f"expected --parallel: {type(self.start.draft).__name__} predicts several tokens in one forward "
                "(`pard_token` in its config), which it would unlearn otherwise"
            )
        self.state = read_run(args.output) if args.resume else {"settings": settings(args), "measured": {}}

    def prepare(self) -> None:
        """Read the text, measure the initial draft, and let the target write, unless an earlier run did."""
        texts, args, start = self.folder / "texts", self.args, self.start
        if not texts.is_dir():
            pieces, self.held = read_text(args, start.tokenizer)
            write_run(args.output, self.state)
            drafts = False  # a head with random weights does not help
            if args.head is None:
                before = self.measure(0, start.draft)
                drafts = distillation.pays(before["greedy"], start.draft, start.target)
            kept = self.folder / "written"
            kept.mkdir(exist_ok=True)
            data = distillation.examples(
                start.target, start.draft if drafts else None, pieces, args.examples,
                None if args.chat_template else args.prompt_tokens, args.new_tokens, args.temperature, args.seed, kept,
            )  # fmt: skip
            unfinished = self.folder / "texts.unfinished"
            DatasetDict(train=data, heldout=Dataset.from_dict({"input_ids": self.held})).save_to_disk(unfinished)
            unfinished.rename(texts)
            shutil.rmtree(kept)
        stored = load_from_disk(texts)
        self.held = stored["heldout"]["input_ids"][:]
        if args.head is not None:
            self.reduce(stored["train"])
            if "0" not in self.state["measured"]:
                self.measure(0, start.draft)
        names = (field.name for field in dataclasses.fields(Recipe) if field.name != "lr")
        lr = 1 / start.draft.config.get_text_config(decoder=True).hidden_size if args.lr is None else args.lr
        recipe = Recipe(lr=lr, **{name: getattr(args, name) for name in names})
        kind = parallel_distillation.ParallelDistillation if args.parallel else distillation.Distillation
        kind = kind if args.head is None else head_training.HeadDistillation
        self.training = kind(start.draft, start.target, stored["train"], recipe)
        self.training.load(self.folder)

    def reduce(self, data: Dataset) -> None:
        """Give the head a vocabulary of its own, if it is to have one: what occurs most often in the target's text."""
        args, target = self.args, self.start.target
        if args.draft_vocab_size is None:
            return
        if "vocabulary" not in self.state:
            rows = zip(data["input_ids"][:], data["completion_mask"][:])
            written = ([token for token, is_new in zip(*row) if is_new] for row in rows)
            size = target.config.get_text_config(decoder=True).vocab_size
            self.state["vocabulary"] = head_training.frequent_tokens(written, args.draft_vocab_size, size).tolist()
        set_seed(args.seed)
        self.start.draft = make_head(args, target, torch.tensor(self.state["vocabulary"]))

    def measure(self, step: int, draft: PreTrainedModel) -> dict[str, Any]:
        """Measure acceptance on the held-out prompts, and store it by the number of steps done."""
        args = self.args
        found = distillation.acceptance(
            self.start.target, draft, self.held, args.new_tokens, args.temperature, args.seed
        )
        names = ("acceptance_rate", "block_efficiency", "drafted_tokens")
        figures = {way: {name: getattr(stats, name) for name in names} for way, stats in found.items()}
        self.state["measured"][str(step)] = figures
        write_run(args.output, self.state)
        rates = ", ".join(f"{way} α {each['acceptance_rate']:.3f}" for way, each in figures.items())
        self.console.print(f"step {step}: {rates}")
        return found

    def train(self) -> bool:
        """Take the remaining steps, with checkpoints and measurements in between; False after Ctrl-C."""
        training, steps = self.training, self.args.steps
        shown = progress(self.console, "training", steps, training.step)
        with distillation.interruptible() as interrupted, shown as advance:
            for loss in training.train():
                advance(training.step, f"loss {loss:.3f}")
                last = training.step == steps
                due = training.step % self.args.checkpoint_every == 0
                if due or last or interrupted:
                    training.save(self.folder)
                if interrupted:
                    return False
                if due and not last:
                    self.measure(training.step, training.draft())
        return True

    def finish(self) -> dict[str, Any]:
        """Measure the trained draft, and save the pair."""
        args, output = self.args, self.args.output
        draft = self.training.draft()
        self.measure(args.steps, draft)
        place = output if args.head is not None else output / "draft"
        if args.head is not None:
            save_folder(draft, output, self.start.target, distillation.GAMMA)
        else:
            draft.save_pretrained(place)
        self.start.tokenizer.save_pretrained(place)
        sources = (self.start.sources[0], ModelReference(str(place)))
        pair = SpecPair(self.start.target, draft, self.start.tokenizer, sources=sources)
        pair.config = pair_file_for(pair, output)
        return self.result(pair)

    def result(self, pair: SpecPair) -> dict[str, Any]:
        """The figures, also in the pair file; the checkpoints are no longer needed."""
        args, output = self.args, self.args.output
        measured = self.state["measured"]
        figures = {"_before": measured["0"], "": measured[str(args.steps)]}
        about = report.surroundings(pair, shlex.join(["scripts/distill_draft", *sys.argv[1:]]))
        kept = ("date", "command", "device", "threads", "dtype", "torch", "transformers")
        entry = {name: about[name] for name in kept} | {
            "batch_size": min(len(self.held), distillation.ROWS_WRITTEN), "prompts": len(self.held),
            "new_tokens": args.new_tokens, "options": {"num_assistant_tokens": distillation.GAMMA},
        }  # fmt: skip
        for when, found in figures.items():
            entry |= {f"{name}{when}": found["greedy"][name] for name in ("acceptance_rate", "block_efficiency")}
            entry[f"sampled_acceptance_rate{when}"] = found["sampled"]["acceptance_rate"]
        dataclasses.replace(pair.config, measured=[entry]).save(output)
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        rose = entry["acceptance_rate"] > entry["acceptance_rate_before"]
        return {"output": str(output), "settings": self.state["settings"], **entry, "steps": measured, "rose": rose}


def show(measured: dict[str, Any], prompts: int) -> None:
    """One row per measurement; the first is before training, the last after it."""
    title = f"{prompts} held-out prompts, γ = {distillation.GAMMA}"
    table = Table("steps", title=title, title_justify="left")
    for heading in ("greedy α", "greedy τ", "sampled α", "sampled τ"):
        table.add_column(heading, justify="right")
    for step, figures in measured.items():
        shown = [(figures[way]["acceptance_rate"], figures[way]["block_efficiency"]) for way in ("greedy", "sampled")]
        table.add_row("before" if step == "0" else step, *(cell for a, t in shown for cell in (f"{a:.3f}", f"{t:.2f}")))
    Console(highlight=False).print(report.fitted(table))


def main() -> int:
    args = parse()
    quiet()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # silences its note that tied weights are saved once
    set_seed(args.seed)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    began = time.perf_counter()
    try:
        run = Run(args, Console(stderr=True, highlight=False))
        run.prepare()
        if not run.train():
            raise KeyboardInterrupt
        result = run.finish()
    except (OSError, ValueError) as error:
        raise SystemExit(f"distill_draft: {error}") from error
    except KeyboardInterrupt:
        if (args.output / RUN).exists():
            print(f"\nInterrupted. To continue: scripts/distill_draft --resume --output {args.output}", file=sys.stderr)
        return 130
    show(result["steps"], result["prompts"])
    print(f"The {'pair' if args.head is None else 'head'} is in {args.output}.")
    print(json.dumps(result | {"seconds": round(time.perf_counter() - began, 1)}))
    return 0 if result["rose"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
