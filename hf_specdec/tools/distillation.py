"""Distillation: a draft's initial weights, its training data, loss and training, and the resulting acceptance.

Writes no files except the checkpoints it is told to write; scripts decide on folders, tables and exit codes. Needs the
extra `train` (accelerate, datasets).
"""

import copy
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, skip_first_batches
from datasets import Dataset, DatasetDict, load_dataset
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from ..records.stats import SpeculationStats
from .journal import Journal, read
from .progress import progress
from .recipe import Recipe, optimizers
from .stdlib import STDLIB, modules

GAMMA = 5  # draft length of the acceptance figures: the library's default
ROWS_WRITTEN = 64  # rows that the target continues at a time
CHUNK = 2**24  # logits converted to float32 probabilities at a time: 64 MiB for each of a few temporaries


# ----------------------------------------------------------------------------------------------------- initial weights


def first_layers(target: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A draft with the target's embeddings, first `layers` layers, final norm and head, in the target's dtype."""
    draft = random_layers(target, layers)
    missing = draft.load_state_dict(target.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(f"{type(target).__name__} with fewer layers has weights that the target lacks: {missing}")
    return draft


def random_layers(target: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A draft with the target's configuration, but `layers` layers and random weights, in the target's dtype."""
    config = copy.deepcopy(target.config)
    text = config.get_text_config(decoder=True)
    if not 1 <= layers < text.num_hidden_layers:
        raise ValueError(
            f"a draft of {type(target).__name__} takes 1 to {text.num_hidden_layers - 1} of its "
            f"{text.num_hidden_layers} layers, got {layers}"
        )
    for name, value in text.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:layers])  # one entry per layer, such as `layer_types`
    text.num_hidden_layers = layers
    draft = type(target)(config).to(target.device, target.dtype).eval()
    if draft.num_parameters() >= target.num_parameters():
        raise ValueError(f"{type(target).__name__} does not take its number of layers from `num_hidden_layers`")
    draft.generation_config = copy.deepcopy(target.generation_config)
    return draft


# ------------------------------------------------------------------------------------------------------- training data


def standard_library(count: int | None = None) -> DatasetDict:
    """Python's standard library, one document per module: `train` (its first `count`, all if None) and `heldout`."""
    names, held_out = modules(), [str(STDLIB / name) for name in modules(held_out=True)]
    if not held_out or not names:
        raise SystemExit(f"Expected the standard library's sources under {STDLIB}, found none; is it a zipped install?")
    files = {"train": [str(STDLIB / name) for name in names[:count]], "heldout": held_out}
    return load_dataset("text", data_files=files, sample_by="document", encoding_errors="replace")


def cut(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, **options: Any) -> list[list[int]]:
    """Cut the texts' tokens into pieces of at most `length`, none spanning two texts; pieces of one token are dropped.

    `options` are passed to the tokenizer, such as `add_special_tokens`.
    """
    rows = tokenizer(texts, verbose=False, **options)["input_ids"] if texts else []
    pieces = [row[at : at + length] for row in rows for at in range(0, len(row), length)]
    return [piece for piece in pieces if len(piece) > 1]


def hold_out(pieces: list[list[int]], count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Split into `(training, held out)`: `count` evenly spaced pieces are held out; their duplicates are dropped."""
    if len(pieces) <= count:
        raise ValueError(
            f"the text has {len(pieces)} pieces of at least two tokens, expected more than the {count} held out: "
            "give more text, or hold out fewer prompts"
        )
    held = [pieces[i * len(pieces) // count] for i in range(count)]
    kept_apart = {tuple(piece) for piece in held}
    training = [piece for piece in pieces if tuple(piece) not in kept_apart]
    if not training:
        raise ValueError(f"nothing is left to train on: the text repeats the {count} pieces held out")
    return training, held


def draws(size: int, count: int, seed: int) -> list[int]:
    """`count` numbers below `size` in random order; every number comes once before any is repeated."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(size, generator=generator) for _ in range(-(-count // size))]
    return torch.cat(rounds)[:count].tolist() if rounds else []


def write(
    target: PreTrainedModel,
    prompts: Sequence[list[int]],
    new_tokens: int,
    temperature: float | None = None,
    draft: PreTrainedModel | None = None,
    what: str | None = None,
    kept: Path | None = None,
    seed: int = 0,
) -> tuple[list[list[int]], SpeculationStats]:
    """Let the target continue the prompts, greedily if `temperature` is None, and with `draft` if there is one.

    Prompts of like lengths are continued together, which saves most of the padding.

    Args:
        what: title of the progress shown on stderr; None shows nothing.
        kept: a file for the rows as they are written. Rows that are in it already are not written again.
        seed: with `kept`, of sampling, so that rows do not depend on where it was interrupted.

    Returns:
        Prompt and continuation of each row, up to and including its end token; and the speculation statistics.
    """
    stats = SpeculationStats()
    config = target.generation_config
    ends = set() if config.eos_token_id is None else set(torch.tensor(config.eos_token_id).flatten().tolist())
    padding = next((each for each in (config.pad_token_id, *ends) if each is not None), 0)
    options: dict[str, Any] = {"do_sample": temperature is not None, "max_new_tokens": new_tokens}
    options |= {"pad_token_id": padding, "return_dict_in_generate": False}
    if temperature is not None:
        options["temperature"] = temperature
    if draft is not None:
        options |= {"assistant_model": draft, "strategy": "spec", "speculation_stats": stats}
        options |= {"num_assistant_tokens": GAMMA, "num_assistant_tokens_schedule": "constant"}
    keeper = None if kept is None else Journal(kept)
    written: list[list[int]] = [] if kept is None else [row["input_ids"] for _, row in read(kept)]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    shown: Any = nullcontext(lambda done: None)
    if what is not None:
        shown = progress(Console(stderr=True, highlight=False), what, len(prompts), len(written))
    with shown as advance, closing(keeper) if keeper is not None else nullcontext():
        for start in range(len(written), len(prompts), ROWS_WRITTEN):
            if keeper is not None:
                torch.manual_seed(seed + start)
            rows = [torch.tensor(prompts[number]) for number in order[start : start + ROWS_WRITTEN]]
            ids = pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
            out = target.generate(ids.to(target.device), attention_mask=mask.to(target.device), **options)
            for row, tokens in zip(rows, out[:, ids.shape[1] :].tolist()):
                length = next((at for at, token in enumerate(tokens, 1) if token in ends), len(tokens))
                written.append(row.tolist() + tokens[:length])
            if keeper is not None:
                keeper.append([{"input_ids": row} for row in written[start:]])
            advance(len(written))
    return [row for _, row in sorted(zip(order, written))], stats


def pays(stats: SpeculationStats, draft: PreTrainedModel, target: PreTrainedModel) -> bool:
    """Whether speculation is likely to be faster: τ > 1 + γ c, with c taken from the parameter counts."""
    return stats.block_efficiency > 1 + GAMMA * draft.num_parameters() / target.num_parameters()


def examples(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    pieces: list[list[int]],
    count: int,
    prompt_tokens: int | None,
    new_tokens: int,
    temperature: float,
    seed: int,
    kept: Path | None = None,
) -> Dataset:
    """The draft's training data: `count` texts as they are, `count` continued greedily, `count` by sampling.

    The target writes the continuations, because drafts are verified along the target's own text. A draft changes
    how fast they are written, but not the text.

    Args:
        prompt_tokens: length of the prompts that the target continues; None keeps the pieces whole, as prompts.
        kept: a folder for what is written, from which an interrupted run goes on.

    Returns:
        `kind` ("text", "greedy", "sampled"), `input_ids` (no piece is used twice while there are enough), and
        `completion_mask`: 0 for the tokens of a prompt, 1 for all others.
    """
    torch.manual_seed(seed)
    chosen = [pieces[i] for i in draws(len(pieces), 3 * count, seed)]
    prompts = [piece[:prompt_tokens] for piece in chosen[count:]]
    lengths = [len(piece) if prompt_tokens is None else 0 for piece in chosen[:count]] + list(map(len, prompts))
    files = [None if kept is None else kept / f"{kind}.jsonl" for kind in ("greedy", "sampled")]
    greedy, _ = write(target, prompts[:count], new_tokens, None, draft, "target writes, greedily", files[0])
    sampled, _ = write(
        target, prompts[count:], new_tokens, temperature, draft, "target writes, sampling", files[1], seed
    )
    kinds = [kind for kind in ("text", "greedy", "sampled") for _ in range(count)]
    rows = chosen[:count] + greedy + sampled
    masks = [[0] * length + [1] * (len(row) - length) for row, length in zip(rows, lengths)]
    return Dataset.from_dict({"kind": kinds, "input_ids": rows, "completion_mask": masks})


# ------------------------------------------------------------------------------------------------------------ loss


def distillation_loss(
    draft_logits: Tensor, target_logits: Tensor, argmax_weight: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """KL(target || draft) over the whole vocabulary, plus cross-entropy on the target's argmax; the mean over tokens.

    One of the divergences that DistillSpec compares (Zhou et al. 2024, arXiv:2310.08461). By Pinsker's inequality it
    bounds rejection when sampling: a draft token is rejected with probability TV(p, q) <= sqrt(KL(p || q) / 2). Greedy
    acceptance only needs the same argmax, hence the second term. Only a few rows at a time become float32
    probabilities; the backward pass recomputes them to save memory.

    Args:
        draft_logits, target_logits: `[..., vocabulary]`; if one is wider because of padding, the excess is ignored.
        argmax_weight: weight of the second term.
        mask: `[...]`, true for the tokens that count; all if None.
    """
    width = min(draft_logits.shape[-1], target_logits.shape[-1])
    q_logits, p_logits = (logits.flatten(0, -2)[:, :width] for logits in (draft_logits, target_logits))
    keep = torch.ones(len(q_logits), device=q_logits.device) if mask is None else mask.flatten()
    rows = keep.nonzero()[:, 0]
    chunks = rows.split(max(1, CHUNK // width))
    sums = [checkpoint(_summed_loss, q_logits, p_logits, c, argmax_weight, use_reentrant=False) for c in chunks]
    return torch.stack(sums).sum() / len(rows)


def _summed_loss(q_logits: Tensor, p_logits: Tensor, rows: Tensor, argmax_weight: float) -> Tensor:
    p_logits = p_logits[rows].float()
    log_q = q_logits[rows].float().log_softmax(-1)
    kl = F.kl_div(log_q, p_logits.log_softmax(-1), log_target=True, reduction="sum")
    return kl + argmax_weight * F.nll_loss(log_q, p_logits.argmax(-1), reduction="sum")


# -------------------------------------------------------------------------------------------------------- training


class Distillation:
    """A draft in training.

    Attributes:
        step: steps done.
    """

    def __init__(self, draft: PreTrainedModel, target: PreTrainedModel, examples: Dataset, recipe: Recipe) -> None:
        self.target, self.recipe, self.step = target.eval(), recipe, 0
        self._trained = copy.deepcopy(draft).to(target.dtype)
        self._accelerator = Accelerator(
            cpu=target.device.type == "cpu",
            mixed_precision=recipe.mixed_precision,
            gradient_accumulation_steps=recipe.accumulate,
        )
        if self._accelerator.num_processes > 1:
            raise ValueError(f"distillation runs in one process, accelerate has {self._accelerator.num_processes}")
        here = self._accelerator.device
        if (here.type, here.index or 0) != (target.device.type, target.device.index or 0):
            raise ValueError(
                f"the target is on {target.device}, accelerate trains on {here}: set CUDA_VISIBLE_DEVICES to choose"
            )
        draft = draft.float()
        chosen = optimizers(draft, recipe.lr, recipe.optimizer)
        schedules = [get_linear_schedule_with_warmup(each, recipe.steps // 10, recipe.steps) for each in chosen]
        rows: Any = _with_masks(examples, recipe.completion_only_loss)
        order = draws(len(rows), recipe.steps * recipe.accumulate * recipe.rows, recipe.seed)
        # Its own generator: a loader draws a seed whenever it is iterated, and a resumed run iterates once more.
        loader: Any = DataLoader(rows, recipe.rows, sampler=order, collate_fn=_collate, generator=torch.Generator())
        self._draft, self._loader, *stepped = self._accelerator.prepare(draft, loader, *chosen, *schedules)
        self._optimizers, self._schedules = stepped[: len(chosen)], stepped[len(chosen) :]

    def train(self) -> Iterator[float]:
        """Take the remaining steps, yielding each step's loss."""
        total = 0.0
        self._draft.train()
        for batch in skip_first_batches(self._loader, self.step * self.recipe.accumulate):
            with self._accelerator.accumulate(self._draft):
                loss = self._loss(batch)
                self._accelerator.backward(loss)
                if self._accelerator.sync_gradients:
                    self._accelerator.clip_grad_norm_(self._draft.parameters(), 1.0)
                for stepped in (*self._optimizers, *self._schedules):
                    stepped.step()
                for optimizer in self._optimizers:
                    optimizer.zero_grad()
            total += loss.item() / self.recipe.accumulate
            if self._accelerator.sync_gradients:
                self.step += 1
                yield total
                total = 0.0

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        batch, counted = {k: v for k, v in batch.items() if k != "counted"}, batch["counted"]
        with torch.no_grad(), self._accelerator.autocast():
            target_logits = self.target(**batch, use_cache=False).logits
        draft_logits = self._draft(**batch, use_cache=False).logits
        return distillation_loss(draft_logits, target_logits, self.recipe.argmax_weight, counted)

    def draft(self) -> PreTrainedModel:
        """The draft as it is now, in the target's dtype, to be measured or saved. The next call changes it."""
        self._trained.load_state_dict(self._draft.state_dict())
        return self._trained.eval()

    def save(self, folder: Path) -> None:
        """Replace the checkpoint in `folder` with `checkpoint-STEP`, written completely or not at all."""
        unfinished, before = folder / "unfinished", list(folder.glob("checkpoint-*"))
        shutil.rmtree(unfinished, ignore_errors=True)
        self._accelerator.save_state(str(unfinished))
        unfinished.rename(folder / f"checkpoint-{self.step:06d}")
        for old in before:
            shutil.rmtree(old)

    def load(self, folder: Path) -> None:
        """Resume from the checkpoint in `folder`, if any: weights, optimizer, schedule, random state, order."""
        for saved in sorted(folder.glob("checkpoint-*"))[-1:]:
            self._accelerator.load_state(str(saved))
            self.step = int(saved.name.removeprefix("checkpoint-"))


def _with_masks(examples: Dataset, completion_only: bool) -> list[tuple[list[int], list[int]]]:
    """Each row's tokens, and a mask: 1 for those that the draft learns. Rows without such a token are left out."""
    rows = examples["input_ids"][:]
    if not completion_only:
        return [(row, [1] * len(row)) for row in rows]
    learned = [(row, mask) for row, mask in zip(rows, examples["completion_mask"][:]) if any(mask)]
    if not learned:
        raise ValueError("`completion_only_loss` leaves nothing to learn from: no example has a token after its prompt")
    return learned


def _collate(rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `counted`, `[rows, tokens]`.

    `counted`: the positions whose logits enter the loss: each position before a learned token, since it predicts that
    token. The last position of a row predicts no known token; it counts if the last token is learned.
    """
    tensors = [torch.tensor(row) for row, _ in rows]
    counted = [torch.tensor([*mask[1:], mask[-1]]) for _, mask in rows]
    return {
        "input_ids": pad_sequence(tensors, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True),
        "counted": pad_sequence(counted, batch_first=True),
    }


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect the first Ctrl-C instead of raising, so that no step is interrupted; the second one raises again."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------------------------------------------------- the result


def acceptance(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: list[list[int]],
    new_tokens: int,
    temperature: float,
    seed: int = 0,
) -> dict[str, SpeculationStats]:
    """Acceptance in real speculative runs over the prompts, "greedy" and "sampled"; the random state is unchanged."""
    devices = [target.device] if target.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        temperatures = {"greedy": None, "sampled": temperature}
        return {name: write(target, prompts, new_tokens, t, draft)[1] for name, t in temperatures.items()}
