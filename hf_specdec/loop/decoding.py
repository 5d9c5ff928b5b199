"""The decoding loop: draft, verify, accept, commit, roll back, until every row has ended.

Start reading at `SpeculativeDecoding.run`. Each step's details are in a file of their own; this one combines them, and
is the only one that appends to the context.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput, logging

from ..device import to_device, to_host
from ..drafters import Draft, Drafter, DraftRequest
from ..drafters.base import check_draft, check_proposed, no_draft, within_vocabulary
from ..models.multimodal_prompt import DoesNotFit
from ..models.self_fed import SelfFedModel
from ..models.target import Target
from ..records.stats import Iteration, SpeculationStats
from ..records.trace import Trace
from ..sampling.acceptance import Verdict
from ..sampling.context import Context
from ..sampling.processors import BlockProcessors
from . import invariants
from .clock import Clock
from .committed import Committed
from .outputs import Recorder
from .ranks import Ranks
from .schedule import Schedule
from .stopping import Stopping
from .streaming import StepStreamer

logger = logging.get_logger(__name__)

# Above this many prompt tokens, one more forward is cheap beside reading the prompt.
_LONG = 512


@dataclass
class SpeculativeDecoding:
    """One prepared `generate()` call (see `generate/session.py`), ready to run.

    Attributes:
        sequential: logits processors are called step by step, as vanilla calls them.
        lockstep: all rows commit equally many tokens per iteration.
        make_target: makes the target anew, with nothing fed to it.
        ranks: the processes that decode this call together; `None` for this one alone.
    """

    context: Context
    target: Target
    make_target: Callable[[], Target]
    drafter: Drafter
    request: DraftRequest
    schedule: Schedule
    processors: LogitsProcessorList
    stopping: Stopping
    recorder: Recorder
    streamer: StepStreamer
    sequential: bool
    lockstep: bool
    prefill_chunk_size: int | None = None
    stats: SpeculationStats = field(default_factory=SpeculationStats)
    trace: Trace | None = None
    ranks: Ranks | None = None
    _pending: list[int] = field(
        default_factory=list
    )  # by active row, queries in the last forward before its last committed token
    _withdrawn: dict[int, int] = field(default_factory=dict)  # see `Committed`
    _finished: set[int] = field(default_factory=set)  # rows that leave the batch after this iteration
    _prefilled: int | None = None  # forwards of the prefill, as long as its time is not known
    _clock: Clock = field(init=False)
    _has_started: bool = False  # the drafter

    def run(self) -> int:
        """Decode all rows to their end. Returns the width of the output in columns."""
        self._clock = Clock(self.context.tokens.device)
        self.prefill()
        while self.context.rows:
            self.iterate()
        if self.ranks is not None:
            self.ranks.flush()
            if self.request.do_sample:
                self.ranks.share_random_state()
        self.stats.draft_prefill_forwards += self.drafter.prefill_forwards
        return self.output_width

    def iterate(self) -> None:
        """One cycle. On CUDA the host waits once, in `accept`; everything before and after is only queued."""
        if self._prefilled is None:
            self._clock.begin()
        forwards = self.drafter.forwards
        draft = self.draft() if self.ranks is None else self.ranks.draft(self.draft, self.context)
        self._clock.lap()
        output = self.verify(draft)
        committed = self.accept(draft, output.logits)
        *prefill, draft_seconds, verify_seconds = self._clock.read()
        if self._prefilled is not None:
            self.stats.add_prefill(sum(prefill), self._prefilled, self.drafter.compile_seconds)
            self._prefilled = None
        iteration = committed.iteration(self.context, draft_seconds, verify_seconds, self.drafter.forwards - forwards)
        try:
            self.commit(committed, output)
            self.roll_back()
            # A streamer's time does not depend on how many tokens are drafted, so the schedule does not see it.
            self.schedule.update(replace(iteration, other_seconds=self._clock.seconds))
            self.streamer.advance(self.context, self.output_width)
        finally:  # if the streamer raises, the tokens are committed already
            self.record(replace(iteration, other_seconds=self._clock.seconds))

    def release(self) -> None:
        """The call is over, or has raised an error: later ones may use what its models used."""
        self.target.release()
        if self.ranks is not None:
            self.ranks.end()
        if self._has_started:
            self.drafter.end()

    def prefill(self) -> None:
        """Feed the prompts to both models, except for the last token, which the first verification feeds.

        If all prompts have the same length, that verification feeds them whole: one forward fewer.
        """
        self.start_drafter()
        chunks: list[tuple[list[int], ModelOutput]] = []
        unlike = len(set(self.target.missing(self.context))) > 1 or any(self.target.prompt_left(self.context))
        is_special = self.prefill_chunk_size or self.recorder.forward_kwargs
        if self.target.prompt_is_unread:
            pass  # the first verification reads it
        elif unlike or is_special or self.target.has_states:
            chunks = self.target.prefill(self.context, self.prefill_chunk_size, **self.recorder.forward_kwargs)
        for counts, output in chunks:
            self.recorder.layers(output, counts)
        self._clock.lap()
        self._prefilled = len(chunks)

    def start_drafter(self) -> None:
        start = partial(self.drafter.start, self.request, self.context)
        start() if self.ranks is None else self.ranks.start(start)
        self._has_started = True

    def draft(self) -> Draft:
        """Up to γ tokens for each active row, always leaving room for the target's own token."""
        context, rows = self.context, len(self.context.rows)
        if self.target.prompt_is_unread or any(self.target.prompt_left(context)) or self._is_first_of_long():
            return no_draft(context)
        left = [max(context.limits[row] - context.ends[row] - 1, 0) for row in context.rows]
        gamma = self.schedule.plan(rows, max(left), self.drafter.unread(context))
        room = [min(pair) for pair in zip(left, self.target.room(context, gamma))]
        max_tokens = min(gamma, max(room))
        if max_tokens == 0:
            return no_draft(context)
        draft = self.drafter.propose(context, max_tokens)
        check_draft(draft, rows, max_tokens, self.request.vocab_size, self.drafter)
        if not self.drafter.in_vocabulary:
            draft = within_vocabulary(draft, self.request.vocab_size)
        lengths = [min(length, space) for length, space in zip(draft.row_lengths, room)]
        encoded = self.target.encoded
        if encoded is not None and encoded.uncounted is not None:
            draft = draft.up_to(encoded.until_uncounted(draft.tokens))
            counted = encoded.all_counted(context, self.target.missing(context))
            lengths = [n if all_counted else 0 for n, all_counted in zip(lengths, counted)]
        return draft.cut(lengths)

    def _is_first_of_long(self) -> bool:
        """Whether the first token would have to wait for the draft model to read a long prompt too."""
        begins = self.context.active_ends[0] == self.context.prompt_width
        return begins and self.drafter.reads_prompts and max(self.context.lengths) > _LONG

    def verify(self, draft: Draft) -> ModelOutput:
        """One target forward over each row's uncached tokens and its drafts: `[rows, γ + 1, vocab]` logits."""
        if self.target.prompt_is_unread:
            output = self._read_prompt()
            self.recorder.prompt(output)
            return CausalLMOutputWithPast(logits=output.logits)
        self.context.clear_drafts()
        self.context.write_drafts(draft.tokens)
        options = self.recorder.forward_kwargs
        verified = self.target.verify(self.context, draft.tokens, draft.row_lengths, **options)
        self.recorder.layers(verified.output, verified.of_prompt)
        self._pending = verified.pending
        return verified.output

    def _read_prompt(self) -> ModelOutput:
        """Vanilla's first forward over the prompt. If our cache cannot hold the result, the model's code continues."""
        try:
            return self.target.read_prompt(**self.recorder.forward_kwargs)
        except DoesNotFit as found:
            if self.recorder.forward_kwargs:
                names = " and ".join(f"`{name}`" for name in self.recorder.forward_kwargs)
                raise ValueError(f"{found}, and then strategy='spec' does not record {names}: leave it out") from found
            if self.drafter.uses_target:
                raise ValueError(
                    f"{found}, but {self.drafter.use_of_target}: pass a draft model as `assistant_model`"
                ) from found
            logger.warning_once(f"{found}: its own code makes the forwards, on copies of what it caches.")
            self.target, self.lockstep = SelfFedModel.going_on(found.first_forward, found.output), True
            found.output.logits = found.output.logits[:, -1:]
            return found.output

    def accept(self, draft: Draft, logits: Tensor) -> Committed:
        """The committed set of each row, cut where vanilla would have stopped."""
        logits = logits.to(device=self.context.tokens.device, dtype=torch.float32, copy=True)
        return self._accept_sequential(draft, logits) if self.sequential else self._accept_block(draft, logits)

    def _accept_block(self, draft: Draft, logits: Tensor) -> Committed:
        """Accept all positions at once: processors are functions of a prefix, and each position's prefix is known."""
        context = self.context
        scores = BlockProcessors(self.processors)(logits, context)
        lengths = draft.lengths_on(scores.device)
        verdict = self.request.rule.judge(draft.tokens, lengths, draft.probs, scores, context)
        tokens, accepted, drafted = self._to_host(verdict, draft, lengths, logits, scores)
        count = [n + 1 for n in accepted]
        if self.lockstep:
            count = [min(count)] * len(count)
        committed = Committed([t[:n] for t, n in zip(tokens, count)], accepted, [None] * len(count), drafted)
        for slot, row in enumerate(context.rows):
            new = committed.tokens[slot]
            committed.finished[slot] = self._finish(row, new)
            for i in range(len(new) if self.recorder.wants_tokens else 0):
                self.recorder.token(row, context.ends[row] + i, logits[slot, i], scores[slot, i])
        if self.stopping.unknown:
            self._ask_unknown(committed, scores.shape[1])
        committed.accepted = [min(n, len(new)) for n, new in zip(accepted, committed.tokens)]
        return committed

    def _finish(self, row: int, tokens: list[int]) -> str | None:
        """Cut `tokens` in place where the row ends. Returns the reason, or `None` if the row goes on."""
        end = self.context.ends[row]
        columns = self.stopping.columns
        hit = None if row in columns else self.stopping.first_end(self.context, row, tokens)
        if hit is not None:
            columns[row] = end + hit[0]
        if self.stopping.pads_finished_rows:
            if hit is not None:
                del tokens[hit[0] :]
            return None if hit is None else hit[1]
        # Without an EOS token, vanilla continues every row until all have met a criterion.
        del tokens[max(self.context.max_length - end, 0) :]
        return "max_length" if end + len(tokens) >= self.context.max_length else None

    def _ask_unknown(self, committed: Committed, width: int) -> None:
        """Cut rows where criteria end them that are called only when all rows have come there.

        Args:
            width: columns after the ends that hold drafts, or may hold tokens.
        """
        context, stopping = self.context, self.stopping
        ends = list(context.ends)
        for row, tokens in zip(context.rows, committed.tokens):
            context.write_on_host(row, tokens, width)
            ends[row] += len(tokens)
        stopping.ask_unknown(context, ends, self.recorder.scores)
        for row, column in stopping.columns.items():
            end = column if stopping.pads_finished_rows else self.output_width
            beyond = ends[row] - end
            if beyond > 0:
                self.recorder.cut(row, end)
            if context.ends[row] > end:
                committed.withdrawn[row] = context.ends[row] - end
            if row not in context.rows or beyond < 0:
                continue
            slot = context.rows.index(row)
            if beyond > 0 or committed.finished[slot] is None:
                del committed.tokens[slot][max(end - context.ends[row], 0) :]
                committed.finished[slot] = "stopping_criteria"

    def _accept_sequential(self, draft: Draft, logits: Tensor) -> Committed:
        """Accept position by position, as vanilla does: processors, choice, criteria, on committed tokens only.

        Processors that may keep state must not see a prefix that is never committed, so each waits for the last choice.
        """
        context, rows = self.context, self.context.rows
        index = context.row_index
        end = context.ends[rows[0]]
        context.clear_drafts()
        lengths = draft.lengths_on(logits.device)
        committed = Committed([[] for _ in rows], [0] * len(rows), [None] * len(rows), [])
        for i in range(draft.tokens.shape[1] + 1):
            view = context.view(end + i)
            full = logits.new_zeros(context.batch_size, logits.shape[2])
            full[index] = logits[:, i]
            raw = full.clone() if self.recorder.wants_logits else full
            scores = self.processors(view, full)
            probs = None if draft.probs is None else draft.probs[:, i : i + 1]
            here = scores[index][:, None].expand(-1, 1 + (i < draft.tokens.shape[1]), -1)
            drafted = draft.tokens[:, i : i + 1]
            verdict = self.request.rule.judge(drafted, (lengths > i).long(), probs, here, context, offset=i)
            # The scores of a row that has ended in this block do not matter.
            ended = to_device([why is not None for why in committed.finished], scores.device)
            verdict = verdict._replace(valid=verdict.valid | ended)
            tokens, accepted, committed.drafted = self._to_host(verdict, draft, lengths, logits[:, i : i + 1], here)
            context.write_drafts(verdict.tokens[:, :1].masked_fill(ended[:, None], context.pad_token_id), offset=i)
            going = self._take_step(
                committed, [row[0] for row in tokens], [n > 0 for n in accepted], raw[index], scores[index]
            )
            if not going or any(accepted[slot] == 0 for slot in going):
                break
        return committed

    def _take_step(
        self, committed: Committed, tokens: list[int], accepted: list[bool], logits: Tensor, scores: Tensor
    ) -> list[int]:
        """Add one token to each row that goes on, and ask all criteria as vanilla does after a step.

        Args:
            tokens: one per active row.
            accepted: whether each is an accepted draft.
            logits, scores: `[active rows, vocab]`, from which they were chosen.

        Returns: the active rows that take part in vanilla's next step.
        """
        context, rows = self.context, self.context.rows
        going = [slot for slot in range(len(rows)) if committed.finished[slot] is None]
        column = context.ends[rows[0]] + len(committed.tokens[going[0]])
        for slot in going:
            committed.tokens[slot].append(tokens[slot])
            committed.accepted[slot] += accepted[slot]
            context.write_on_host(rows[slot], committed.tokens[slot])
            self.recorder.token(rows[slot], column, logits[slot], scores[slot])
        end = column + 1
        scores_so_far = self.recorder.scores(end - context.prompt_width)
        done = self.stopping.after_step(self.stopping.criteria, context, end, scores_so_far)
        for slot in going:
            row = rows[slot]
            if done[row]:
                self.stopping.columns.setdefault(row, end)
                if self.stopping.pads_finished_rows or end >= context.max_length:
                    reason = self.stopping.reason(context, row, tokens[slot], end)
                    committed.finished[slot] = reason or "stopping_criteria"
        all_done = len(self.stopping.columns) == context.batch_size
        return [] if all_done else [slot for slot in going if committed.finished[slot] is None]

    def _to_host(
        self, verdict: Verdict, draft: Draft, lengths: Tensor, logits: Tensor, scores: Tensor
    ) -> tuple[list[list[int]], list[int], list[list[int]]]:
        """The one synchronisation of an iteration: new tokens, accepted lengths and drafts as Python numbers."""
        draft_valid = torch.ones_like(verdict.valid) if draft.valid is None else draft.valid
        flags = torch.stack([verdict.accepted, lengths, verdict.valid, draft_valid], dim=1)
        packed = self._choose(torch.cat([flags, verdict.tokens, draft.proposed], dim=1))
        first, last = flags.shape[1], flags.shape[1] + verdict.tokens.shape[1]
        drafted = [row[last:][: row[1]] for row in packed]
        check_proposed(drafted, self.request.vocab_size, self.drafter)
        for slot, (row, (accepted, _, valid, valid_draft, *_)) in enumerate(zip(self.context.rows, packed)):
            if not valid_draft:
                owner = getattr(self.drafter, "model", self.drafter)
                self._raise_no_distribution(f"draft model ({type(owner).__name__})", row)
            used = slice(accepted + 1)
            if not valid and not self._vanilla_would_choose(logits[slot, used], scores[slot, used]):
                self._raise_no_distribution(f"target model ({type(self.target.model).__name__})", row)
        return [row[first:last] for row in packed], [row[0] for row in packed], drafted

    def _choose(self, packed: Tensor) -> list[list[int]]:
        """On the host; of several ranks, what the first one says."""
        if self.ranks is None:
            return list(to_host(packed).tolist())
        rows = self.context.rows
        values, are_up = self.ranks.choose(packed, self.stopping.ask_time(rows))
        self.stopping.set_time(rows, are_up)
        return values

    def _vanilla_would_choose(self, logits: Tensor, scores: Tensor) -> bool:
        """Processors may turn finite logits into inf or NaN: vanilla's argmax accepts that, sampling cannot."""
        left = (scores.amax(dim=-1) != float("-inf")).all()
        return not self.request.do_sample and bool(logits.amax(dim=-1).isfinite().all() & left)

    def _raise_no_distribution(self, model: str, row: int) -> None:
        raise ValueError(
            f"The {model} gave no distribution over the vocabulary for {self._name(row)} after column "
            f"{self.context.ends[row] - 1}: its scores hold NaN or +inf, or are all -inf. Check its weights and dtype, "
            "and the logits processors"
        )

    def _name(self, row: int) -> str:
        """A row, in messages."""
        return f"row {row}"

    def record(self, iteration: Iteration) -> None:
        """Add the iteration to statistics and trace."""
        self.stats.add(iteration)
        if self.trace is not None:
            self.trace.add(iteration)

    def commit(self, committed: Committed, output: ModelOutput) -> None:
        """Append each row's committed set."""
        self.recorder.layers(output, [len(tokens) for tokens in committed.tokens], self._pending)
        self.context.append(committed.tokens)
        self._withdrawn = committed.withdrawn
        for row, count in committed.withdrawn.items():
            self.context.withdraw(row, count)
            if row not in self.context.rows:  # of the others, the cache forgets them when it rolls back
                self.target.forget([row], [count])
        self._finished = {row for row, why in zip(self.context.rows, committed.finished) if why is not None}

    def roll_back(self) -> None:
        """Both caches keep only committed tokens; finished rows leave the batch."""
        self.target.commit(self.context)
        self.drafter.commit(self.context)
        if invariants.ENABLED:
            draft, own = (getattr(self.drafter, name, None) for name in ("cached", "own"))
            invariants.check_iteration(self.context, self.target, draft, self._withdrawn, own)
        rows = self.context.rows
        width = self.output_width
        if len(self.stopping.columns) == self.context.batch_size:  # no row needs to go beyond the end of the longest
            self._finished |= {row for row in rows if self.context.ends[row] >= width}
        for row in self._finished:  # the last row fills the gap, so caches move one row only
            gap = rows.index(row)
            rows[gap] = rows[-1]
            rows.pop()

    @property
    def output_width(self) -> int:
        """Columns of the output: `max_length` until every row has met a criterion."""
        return self.stopping.width(self.context)
