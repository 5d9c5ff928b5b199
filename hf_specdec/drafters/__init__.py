"""Drafters propose tokens. `base.py` has the protocol; each other file has one drafter."""

from .base import Draft, Drafter, DraftRequest
from .model import ModelDrafter
from .other_tokenizer import OtherTokenizerDrafter
from .prompt_lookup import PromptLookupDrafter

__all__ = ["Draft", "DraftRequest", "Drafter", "ModelDrafter", "OtherTokenizerDrafter", "PromptLookupDrafter"]
