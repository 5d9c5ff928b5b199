"""From one tokenizer's tokens to another's, over the bytes that they stand for; a row at a time, as its text grows."""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .token_bytes import TokenBytes

logger = logging.get_logger(__name__)

# Drafts go by token if at least these shares of the target's and of the draft's tokens are tokens of the other too.
SHARED_OF_TARGET, SHARED_OF_DRAFT = 0.25, 0.5
_LONGEST = 256  # bytes that are encoded anew in each iteration, at most
_KEPT = 64  # of longer ones without a space, so many bytes stay open

# By the two tokenizers, with how many tokens they had.
_Known: TypeAlias = "weakref.WeakKeyDictionary[object, tuple[tuple[int, int], Bridge]]"
_bridges: "weakref.WeakKeyDictionary[object, _Known]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Shared:
    """The tokens that mean the same in both vocabularies.

    Attributes:
        target: `[n]` their ids in the target's vocabulary, each once.
        draft: `[n]` the ids of the same tokens in the draft's.
        more: further tokens of the draft that mean the same as one of these: pairs of such tensors, in each of which a
            target id comes once.
        to_draft: `[target vocab]` the draft's id for each of the target's, -1 for those that are not shared.
    """

    target: Tensor
    draft: Tensor
    more: list[tuple[Tensor, Tensor]]
    to_draft: Tensor

    def to(self, device: torch.device) -> "Shared":
        more = [(target.to(device), draft.to(device)) for target, draft in self.more]
        return Shared(self.target.to(device), self.draft.to(device), more, self.to_draft.to(device))

    def target_scores(self, logits: Tensor, vocab_size: int) -> Tensor:
        """The draft's distribution over the shared tokens, in the target's vocabulary.

        Args:
            logits: `[rows, k, draft vocab]`.

        Returns: `[rows, k, vocab_size]` logits; -inf for other tokens. Those of tokens with one meaning are summed.
        """
        scores = logits.new_full((*logits.shape[:2], vocab_size), -torch.inf)
        scores[..., self.target] = logits[..., self.draft]
        for target, draft in self.more:
            scores[..., target] = torch.logaddexp(scores[..., target], logits[..., draft])
        return scores


class Bridge:
    """What the tokens of a target's and a draft's tokenizer have to do with each other.

    Attributes:
        target, draft: the two tokenizers.
        to_draft: special tokens of the draft by those of the target: of the same text, else in the same role.
        to_target: the same in the other direction.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, draft_tokenizer: PreTrainedTokenizerBase):
        self.target = TokenBytes(tokenizer, "tokenizer")
        self.draft = TokenBytes(draft_tokenizer, "assistant_tokenizer")
        self.to_draft = _same_role(self.target, self.draft)
        self.to_target = _same_role(self.draft, self.target)
        self._shared: dict[tuple[int, int], Shared] = {}
        of_target, of_draft = self.overlap
        how = "by token, over those that they share" if self.by_token else "as text, which the target's encodes"
        logger.info(
            f"The draft has another tokenizer: {of_target:.0%} of the target's tokens and {of_draft:.0%} of the "
            f"draft's are tokens of the other too, so drafts are passed on {how}."
        )

    @property
    def by_token(self) -> bool:
        """Whether the two share enough tokens to draft within them."""
        of_target, of_draft = self.overlap
        return of_target >= SHARED_OF_TARGET and of_draft >= SHARED_OF_DRAFT

    @cached_property
    def overlap(self) -> tuple[float, float]:
        """The share of the target's tokens that stand for the bytes of one of the draft's, and the other way round."""
        target, draft = self.target.by_bytes.keys(), self.draft.by_bytes.keys()
        common = len(target & draft)
        return common / max(len(target), 1), common / max(len(draft), 1)

    def shared(self, vocab_size: int, draft_size: int) -> Shared:
        """The tokens of both, of those that the models know; on the host.

        Args:
            vocab_size, draft_size: ids below these are known to target and draft.
        """
        if (vocab_size, draft_size) not in self._shared:
            self._shared[vocab_size, draft_size] = self._find_shared(vocab_size, draft_size)
        return self._shared[vocab_size, draft_size]

    def _find_shared(self, vocab_size: int, draft_size: int) -> Shared:
        to_target, to_draft = self.target.by_bytes, self.draft.by_bytes
        first: dict[int, int] = {}  # of the target -> of the draft
        more: dict[int, list[int]] = {}
        for draft, piece in enumerate(self.draft.pieces[:draft_size]):
            target = self.to_target.get(draft) if piece is None else to_target.get(piece)
            if target is None or target >= vocab_size or piece == b"":
                continue
            best = draft if piece is None else to_draft[piece]
            if target not in first and (draft == best or best >= draft_size):
                first[target] = draft
            else:
                more.setdefault(target, []).append(draft)
        for target in [target for target in more if target not in first]:
            first[target] = more[target].pop(0)
        rounds = []
        while left := [target for target, drafts in more.items() if drafts]:
            rounds.append((torch.tensor(left), torch.tensor([more[target].pop() for target in left])))
        to_draft_ids = torch.full((vocab_size,), -1)
        targets, drafts = torch.tensor(list(first), dtype=torch.int64), torch.tensor(list(first.values()))
        to_draft_ids[targets] = drafts
        return Shared(targets, drafts, rounds, to_draft_ids)


class RowText:
    """One row's text as the draft reads it, and the end of it as the target has written it.

        text           the qui|ck brown fox          each token of the target adds bytes
        draft tokens   the qu|ick brown| fox         those before the last word are final, the others may change
                                        ^ final

    Attributes:
        ids: the draft's tokens for all of the text, at least one.
    """

    def __init__(self, bridge: Bridge):
        self._bridge = bridge
        self.ids = list(bridge.draft.prefix)
        self._final = len(self.ids)  # how many of them no longer change
        self._open = bytearray()  # the text after these
        self._is_empty = True  # no text has come yet
        # The target's last tokens, which it may have written in another way if more text had followed.
        self._tail: list[int] = []
        self._tail_bytes = b""

    def read(self, tokens: Iterable[int], drafted: Sequence[int] = ()) -> int:
        """Append tokens of the target.

        Args:
            drafted: the draft's tokens that it has read after `ids`.

        Returns: how many tokens of `ids` and `drafted` stay.
        """
        begin = self._final
        before = [*self.ids[begin:], *drafted]
        del self.ids[begin:]
        for token in tokens:
            self._append(token)
        cut = _last_word(self._open)
        if cut:
            self._close(cut)
        self.ids += self._bridge.draft.encode(bytes(self._open))
        if not self.ids:  # a model cannot read nothing
            roles = self._bridge.draft.roles
            self.ids = [next((roles[role] for role in ("bos", "cls", "eos", "pad") if role in roles), 0)]
            self._final = 1
        after = self.ids[begin:]
        same = next(
            (i for i, pair in enumerate(zip(before, after)) if pair[0] != pair[1]), min(len(before), len(after))
        )
        return begin + same

    def continued(self, drafted: Sequence[int]) -> list[int]:
        """Tokens of the draft after this text, as tokens of the target.

        Text has no end that says where the last token ends: it is left out unless the draft wrote it as one token too.
        """
        bridge = self._bridge
        data, last, end = b"", b"", None
        for token in drafted:
            piece = bridge.draft.pieces[token] if token < len(bridge.draft.pieces) else None
            if piece is None:
                end = bridge.to_target.get(token)
                break
            data, last = data + piece, piece
        if self._is_empty:
            data = self._begun(data, bridge.draft, bridge.target)
        ids = bridge.target.encode(self._tail_bytes + data)
        count = len(self._tail)
        ids = ids[count:] if ids[:count] == self._tail else bridge.target.encode(data)
        if end is not None:
            return [*ids, end]
        if len(ids) > 1 and (bridge.target.pieces[ids[-1]] or b"").strip() != last.strip():
            ids.pop()
        return ids

    def _append(self, token: int) -> None:
        bridge = self._bridge
        piece = bridge.target.pieces[token] if 0 <= token < len(bridge.target.pieces) else None
        if piece is None:
            self._append_special(token)
            return
        self._open += self._begun(piece, bridge.target, bridge.draft) if self._is_empty else piece
        self._is_empty = False
        if (piece[:1] == b" " and not self._tail_bytes[-1:].isspace()) or len(self._tail_bytes) > _LONGEST:
            self._tail, self._tail_bytes = [token], piece
        else:
            self._tail.append(token)
            self._tail_bytes += piece

    def _append_special(self, token: int) -> None:
        bridge = self._bridge
        self._close(len(self._open))
        self._tail, self._tail_bytes = [], b""
        if self._is_empty and token == bridge.target.roles.get("bos"):
            return  # the draft's own tokenizer says what comes first
        if token in bridge.to_draft:
            self.ids.append(bridge.to_draft[token])
            self._final += 1

    def _close(self, end: int) -> None:
        """The tokens of the first `end` bytes become final."""
        new = self._bridge.draft.encode(bytes(self._open[:end]))
        self.ids += new
        self._final += len(new)
        del self._open[:end]

    @staticmethod
    def _begun(data: bytes, source: TokenBytes, destination: TokenBytes) -> bytes:
        """The beginning of a text, with the space that `destination` puts there instead of that of `source`."""
        text = data[1:] if source.begins_with_space and data[:1] == b" " else data
        return b" " + text if destination.adds_space else text


def bridge_between(tokenizer: PreTrainedTokenizerBase, draft_tokenizer: PreTrainedTokenizerBase) -> Bridge:
    """The bridge between two tokenizers; made once, and again when tokens were added to them.

    Raises:
        ValueError: if the tokens of one of them cannot be mapped to bytes.
    """
    bridge = known_bridge(tokenizer, draft_tokenizer)
    if bridge is None:
        bridge = Bridge(tokenizer, draft_tokenizer)
        bridges = _bridges.setdefault(tokenizer, weakref.WeakKeyDictionary())
        bridges[draft_tokenizer] = (len(tokenizer), len(draft_tokenizer)), bridge
    return bridge


def known_bridge(tokenizer: PreTrainedTokenizerBase, draft_tokenizer: PreTrainedTokenizerBase) -> Bridge | None:
    """The bridge between two tokenizers, if it has been made and they have not grown since."""
    sizes, bridge = _bridges.get(tokenizer, {}).get(draft_tokenizer, (None, None))
    return bridge if sizes == (len(tokenizer), len(draft_tokenizer)) else None


def _same_role(one: TokenBytes, other: TokenBytes) -> dict[int, int]:
    """The special tokens of `other` by those of `one`. Padding and unknown text have no counterpart."""
    by_name = {name: i for i, name in other.names.items()}
    by_role = {
        one.roles[role]: other.roles[role]
        for role in ("mask", "cls", "sep", "bos", "eos")
        if role in one.roles and role in other.roles
    }
    left_out = {i for role, i in one.roles.items() if role in ("pad", "unk")} - {one.roles.get("eos")}
    found = {i: by_name.get(name, by_role.get(i)) for i, name in one.names.items() if i not in left_out}
    return {i: match for i, match in found.items() if match is not None}


def _last_word(text: bytearray) -> int:
    """Where the last word begins: at a space after something else. What comes before is encoded for good.

    A long text without such a space is cut at a line's end, else between two characters.
    """
    cut = _last_after_text(text, b" ", len(text))
    if len(text) - cut <= _LONGEST:
        return cut
    cut = len(text) - _KEPT
    if line := _last_after_text(text, b"\n", cut):
        return line
    while cut and text[cut] & 0xC0 == 0x80:  # inside of a character
        cut -= 1
    return cut


def _last_after_text(text: bytearray, byte: bytes, end: int) -> int:
    """Where this byte comes last before `end` with something before it that is not whitespace; 0 if nowhere."""
    while (end := text.rfind(byte, 0, end)) > 0:
        if not text[end - 1 : end].isspace():
            return end
    return 0
