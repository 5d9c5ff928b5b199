"""Small tokenizers of all kinds, trained on code of the standard library, and models that have learned from it."""

import functools
import inspect
import json
import shlex
import string
import textwrap
from typing import Any

import torch
from conftest import SIZES, make_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, MistralConfig, PreTrainedModel, PreTrainedTokenizerFast

MORE = "naïve café, déjà vu: 你好，世界。 🙂🙃 ok\n"
PARTS = [inspect.getsource(module) for module in (textwrap, string, shlex)]
CORPUS = "".join(PARTS) + 20 * MORE
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level(text: str, size: int, end: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[end, "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, pad_token="<pad>")


def _space_first() -> Tokenizer:
    """As Llama 2: a space before the text, spaces as `▁`, no pre-tokenizer."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([CORPUS.replace("\n", "")], trainer)
    form = json.loads(backend.to_str())["model"]
    vocabulary = form["vocab"] | {name: len(form["vocab"]) + i for i, name in enumerate(BYTES)}
    merges = [tuple(pair) for pair in form["merges"]]
    whole = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    whole.normalizer = backend.normalizer
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_ends(whole)


def _unigram() -> Tokenizer:
    """With the pieces of `_space_first`, because the trainer's differ from run to run."""
    pieces = sorted(_space_first().get_vocab().items(), key=lambda item: item[1])
    vocabulary = [(piece, -20.0 if piece in BYTES else -4 - i / 100) for piece, i in pieces]
    whole = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    whole.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _with_ends(whole)


def _with_ends(backend: Tokenizer) -> Tokenizer:
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return backend


def _word_pieces() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend = Tokenizer(models.BPE(continuing_subword_prefix="##"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, continuing_subword_prefix="##", show_progress=False
    )
    backend.train_from_iterator([CORPUS], trainer)
    found = json.loads(backend.to_str())["model"]["vocab"].keys() - {*special}
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(found)])}  # the trainer's order differs by run
    backend.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    backend.decoder = decoders.WordPiece()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def _characters() -> PreTrainedTokenizerFast:
    letters = sorted(set(CORPUS) - set("你好🙂"))
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<end>", *letters])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    if kind == "bytes":
        return _byte_level(CORPUS, 420, "<|end|>")
    if kind == "other bytes":
        return _byte_level(PARTS[0] + PARTS[2] + MORE, 390, "</s>")
    if kind == "space first":
        return PreTrainedTokenizerFast(tokenizer_object=_space_first(), **roles)
    if kind == "unigram":
        return PreTrainedTokenizerFast(tokenizer_object=_unigram(), **roles)
    return _word_pieces() if kind == "word pieces" else _characters()


KINDS = ("bytes", "other bytes", "space first", "unigram", "word pieces", "characters")
EXACT = tuple(kind for kind in KINDS if kind != "word pieces")  # the others change a text


def model_of(kind: str, window: int | None = None) -> PreTrainedModel:
    """A tiny model that has learned from the corpus, the same one in each call."""
    return _model(kind, window)


@functools.cache
def _model(kind: str, window: int | None) -> PreTrainedModel:
    """Knows which token comes after which, from counts. Attention adds noise that depends on the context."""
    tokenizer, width = tokenizer_of(kind), 64
    config: dict[str, Any] = SIZES | {"vocab_size": len(tokenizer), "hidden_size": width, "num_hidden_layers": 1}
    config |= {"max_position_embeddings": 1024, "tie_word_embeddings": False}
    kinds = LlamaConfig(**config) if window is None else MistralConfig(**config, sliding_window=window)
    model = make_model(kinds, seed=5)
    ids = torch.tensor(tokenizer(CORPUS, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id or 0])
    counts = torch.full((len(tokenizer), len(tokenizer)), 0.02)
    counts.index_put_((ids[:-1], ids[1:]), torch.tensor(1.0), accumulate=True)
    counts.fill_diagonal_(0.02)  # else greedy texts repeat one token
    counts *= 1 + torch.rand(counts.shape, generator=torch.Generator().manual_seed(0)) / 2  # no ties
    scores = (counts / counts.sum(dim=1, keepdim=True)).log()
    left, values, right = torch.linalg.svd(scores - scores.mean(dim=1, keepdim=True))
    left, right = left[:, : width - 1] * values[: width - 1], right[: width - 1]
    longest = left.norm(dim=1).max() * 1.01
    rest = (longest**2 - left.norm(dim=1, keepdim=True) ** 2).sqrt()  # so that the norm before the head changes nothing
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(
            torch.cat([left, rest], dim=1) / longest * 80
        )  # much larger than what attention adds
        head = torch.cat([right.T, torch.zeros(len(tokenizer), 1)], dim=1)
        model.get_output_embeddings().weight.copy_(head * longest / width**0.5)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.6)
            layer.mlp.down_proj.weight.mul_(0.3)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


PROMPTS = [
    "def wrap(text, width=70, **kwargs):\n    ",
    'class TextWrapper:\n    """',
    "naïve café 🙂",
    "import re\n\n",
    "    def _split(self, text):\n        chunks =",
    "é",
    "return self.",
    "if not lines:\n",
]


def inputs_of(kind: str, rows: int) -> dict[str, torch.Tensor]:
    tokenizer = tokenizer_of(kind)
    tokenizer.padding_side = "left"
    given = {"add_special_tokens": False} if kind == "word pieces" else {}  # it would put an end after them
    batch = tokenizer(PROMPTS[:rows], return_tensors="pt", padding=True, return_token_type_ids=False, **given)
    return dict(batch)
