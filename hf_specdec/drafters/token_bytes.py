"""What the token ids of a tokenizer mean, in bytes, so that two tokenizers can be compared; and its tokens for bytes.

Never uses `decode()`, which cleans text up and cannot show half a character. What a token stands for follows from the
tokenizer's own description: its decoder, pre-tokenizer and normalizer.
"""

import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

ROLES = ("bos", "eos", "sep", "cls", "mask", "pad", "unk")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # what SentencePiece writes for a space
# Pre-tokenizers after which no token says where there was whitespace.
_DISCARD_SPACES = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
_PROBED = 64  # tokens whose bytes are encoded to see whether they come back


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of byte-level tokens stands for (the alphabet of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


class TokenBytes:
    """A tokenizer as a map between token ids and bytes.

    Attributes:
        pieces: by id, the bytes of a token; `None` for special tokens, and for ids without a token.
        names: by id, the text of a special token.
        roles: ids by role: "bos", "eos", "pad"...
        prefix: the special tokens that it puts before a text.
        adds_space: it puts a space of its own before a text.
        size: one more than the largest id of its base vocabulary, without added tokens.
        begins_with_space: the bytes of a text's first token begin with a space that is not in the text.

    Raises:
        ValueError: if what its tokens stand for cannot be found out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, argument: str):
        self._name = f"`{argument}` ({type(tokenizer).__name__})"
        backend = getattr(tokenizer, "backend_tokenizer", None)
        form = self._form(tokenizer, backend)
        decoders, pre = _steps(form.get("decoder")), _steps(form.get("pre_tokenizer"))
        words = any(step["type"] in _DISCARD_SPACES for step in pre)
        added = {token["id"]: token for token in form["added_tokens"]}
        special = {i for i, token in added.items() if token["special"]} | {*tokenizer.all_special_ids}
        meaning = self._meaning(decoders, form.get("model", {}), words)
        vocabulary = tokenizer.get_vocab()
        self.size = max((i for i in vocabulary.values() if i not in added), default=-1) + 1
        self.pieces: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        self.names: dict[int, str] = {}
        self._fallback: set[int] = set()  # ids of tokens that are written as a byte's number
        unknown = form.get("model", {}).get("unk_token"), form.get("model", {}).get("unk_id")
        for token, i in vocabulary.items():
            if i in special or token == unknown[0] or i == unknown[1]:
                self.names[i] = token
            else:
                self.pieces[i] = token.encode() if i in added else meaning(token)
                if _BYTE.fullmatch(token):
                    self._fallback.add(i)
        self.roles = {role: i for role in ROLES if (i := getattr(tokenizer, f"{role}_token_id", None)) is not None}
        self.adds_space = backend is None or _adds_space(form)
        self.begins_with_space = self.adds_space or words or any(step["type"] == "WordPiece" for step in decoders)
        self._encode = self._encoder(tokenizer, form if backend is not None else None)
        self._byte_ids = {piece[0]: i for piece, i in self.by_bytes.items() if len(piece) == 1}
        self._check()

    def encode(self, data: bytes) -> list[int]:
        """The tokens of a part of a text, without a space or special tokens of its own before it.

        Bytes that are not UTF-8 become tokens of one byte each, as far as there are such.
        """
        ids: list[int] = []
        while data:
            try:
                return ids + self._encode(data.decode())
            except UnicodeDecodeError as error:
                if error.start:
                    ids += self._encode(data[: error.start].decode())
                ids += [self._byte_ids[byte] for byte in data[error.start : error.end] if byte in self._byte_ids]
                data = data[error.end :]
        return ids

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """The token for each sequence of bytes that is one; of several, one that is not a byte's number."""
        found: dict[bytes, int] = {}
        for i, piece in enumerate(self.pieces):
            if piece and (piece not in found or (found[piece] in self._fallback and i not in self._fallback)):
                found[piece] = i
        return found

    def _form(self, tokenizer: PreTrainedTokenizerBase, backend: Any) -> dict[str, Any]:
        """The description of a tokenizer, in the format of `tokenizer.json`."""
        if backend is not None:
            try:
                form: dict[str, Any] = json.loads(backend.to_str())
            except Exception as error:  # `tokenizers` raises nothing more specific
                raise self._refusal("it has parts that are written in Python") from error
            return form
        if hasattr(tokenizer, "sp_model"):
            decoder: dict[str, Any] = {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                    {"type": "ByteFallback"},
                ],
            }
        else:
            decoder = {"type": "ByteLevel"} if hasattr(tokenizer, "byte_decoder") else {"type": "Fuse"}
        added = [
            {"id": i, "content": str(token), "special": token.special}
            for i, token in tokenizer.added_tokens_decoder.items()
        ]
        return {"decoder": decoder, "added_tokens": added}

    def _meaning(self, decoders: list[dict[str, Any]], model: dict[str, Any], words: bool) -> Callable[[str], bytes]:
        """What an ordinary token stands for.

        Args:
            decoders: the decoder's steps.
            words: tokens begin words unless they say that they continue one.
        """
        known = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "ByteLevel", "WordPiece", "BPEDecoder"}
        if other := next((step["type"] for step in decoders if step["type"] not in known), None):
            raise self._refusal(f"its decoder is a {other}")
        if not decoders and words:
            prefix = model.get("continuing_subword_prefix") or "##"
            decoders = [{"type": "WordPiece", "prefix": prefix, "cleanup": False}]

        def meaning(token: str) -> bytes:
            for step in decoders:
                kind = step["type"]
                if kind == "ByteLevel":
                    return b"".join(bytes([_ALPHABET[c]]) if c in _ALPHABET else c.encode() for c in token)
                if kind == "ByteFallback" and (byte := _BYTE.fullmatch(token)):
                    return bytes([int(byte[1], 16)])
                if kind == "Fuse":
                    break  # what follows is done to the whole text
                token = _decoded(token, step)
            return token.encode()

        return meaning

    def _encoder(self, tokenizer: PreTrainedTokenizerBase, form: dict[str, Any] | None) -> Callable[[str], list[int]]:
        """Text -> ids, by a copy of the tokenizer, without the user's padding, truncation and special tokens."""
        if form is None:
            text = tokenizer("a")["input_ids"]
            self.prefix = _leading(text, self.names)
            return lambda text: tokenizer.convert_tokens_to_ids(
                tokenizer.tokenize(text.removeprefix(" ") if self.adds_space else text, split_special_tokens=True)
            )
        form = dict(form, truncation=None, padding=None)
        form["normalizer"] = _sequence(_without_start(_steps(form.get("normalizer"))), "normalizers")
        form["pre_tokenizer"] = _sequence(_without_prefix(_steps(form.get("pre_tokenizer"))), "pretokenizers")
        copy = Tokenizer.from_str(json.dumps(form))
        try:
            self.prefix = _leading(copy.encode("a").ids, self.names)
        except Exception:  # as below
            self.prefix = []
        copy.encode_special_tokens = True

        def encode(text: str) -> list[int]:
            try:
                ids: list[int] = copy.encode(text, add_special_tokens=False).ids
                return ids
            except Exception:  # a vocabulary without a token for unknown text has none for this one
                return []

        return encode

    def _check(self) -> None:
        """Encode the bytes of some tokens: they must come back."""
        usable = [piece for piece in self.by_bytes if piece.strip() and _is_text(piece)]
        probed = usable[:: max(len(usable) // _PROBED, 1)][:_PROBED]
        back = [b"".join(self.pieces[i] or b"" for i in self.encode(piece)).strip() for piece in probed]
        right = sum(piece.strip() == data for piece, data in zip(probed, back))
        if 2 * right <= len(probed):
            raise self._refusal(f"of {len(probed)} tokens' texts, {len(probed) - right} are encoded as another text")

    def _refusal(self, why: str) -> ValueError:
        return ValueError(
            f"The tokens of {self._name} cannot be mapped to bytes ({why}), so strategy='spec' cannot draft across "
            "tokenizers with it: use a draft of the target's family"
        )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, in order."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = next(value for name, value in part.items() if name != "type")
    return [step for each in inner for step in _steps(each)]


def _sequence(steps: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return {"type": "Sequence", name: steps} if steps else None


def _decoded(token: str, step: dict[str, Any]) -> str:
    """One step of a decoder, on one token inside of a text."""
    kind = step["type"]
    if kind == "Replace":
        pattern = step["pattern"]
        if "String" in pattern:
            return token.replace(pattern["String"], step["content"])
        return re.sub(pattern["Regex"], lambda _: step["content"], token)
    if kind == "Metaspace":
        return token.replace(step["replacement"], " ")
    if kind == "BPEDecoder":
        suffix = step["suffix"]
        return token.removesuffix(suffix) + " " if token.endswith(suffix) else token
    if kind == "WordPiece":
        if token.startswith(step["prefix"]):
            return token.removeprefix(step["prefix"])
        return token if step["cleanup"] and token in (".", "?", "!", ",") else f" {token}"
    return token


def _adds_space(form: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    if any(step["type"] == "Prepend" for step in _steps(form.get("normalizer"))):
        return True
    pre = _steps(form.get("pre_tokenizer"))
    return pre != _without_prefix(pre)


def _without_start(normalizers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps that do nothing special to a text's beginning."""
    return [step for step in normalizers if step["type"] not in ("Prepend", "Strip")]


def _without_prefix(pre_tokenizers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same without a space before the first word. Where whitespace has been discarded before, each word gets it."""
    steps, discarded = [], False
    for step in pre_tokenizers:
        discarded |= step["type"] in _DISCARD_SPACES
        if step["type"] == "ByteLevel" and step["add_prefix_space"]:
            step = {**step, "add_prefix_space": False}
        elif step["type"] == "Metaspace" and not discarded and step.get("prepend_scheme", "always") != "never":
            step = {**step, "prepend_scheme": "never"}
            step.pop("add_prefix_space", None)
        steps.append(step)
    return steps


def _leading(ids: list[int], special: dict[int, str]) -> list[int]:
    """The special tokens that a sequence begins with."""
    return ids[: next((i for i, token in enumerate(ids) if token not in special), len(ids))]


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
