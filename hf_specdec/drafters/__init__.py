"""Drafters propose tokens. `base.py` has the protocol; each other file has one drafter."""

from .base import Draft, Drafter, DraftRequest
from .early_exit import EarlyExitDrafter
from .either import Either
from .model import ModelDrafter
from .other_tokenizer import OtherTokenizerDrafter
from .parallel import ParallelDrafter
from .prompt_lookup import PromptLookupDrafter
from .suffix import SuffixDrafter

__all__ = [
    "Draft",
    "DraftRequest",
    "Drafter",
    "EarlyExitDrafter",
    "Either",
    "ModelDrafter",
    "OtherTokenizerDrafter",
    "ParallelDrafter",
    "PromptLookupDrafter",
    "SuffixDrafter",
]
