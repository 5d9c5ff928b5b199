"""Heads: small modules that draft from the hidden states of the target's own forwards.

`drafter.py` drafts with any of them, on the entries that `entries.py` keeps; `blocks.py` with those that see several
tokens in one forward. Each family has a file, and `loading.py` reads their files.
"""

from .blocks import BlockDrafter, drafter_of
from .dflash import DFlashConfig, DFlashHead
from .drafter import HeadDrafter
from .eagle3 import Eagle3Config, Eagle3Head
from .head import Head
from .mtp import MtpHead

__all__ = [
    "BlockDrafter",
    "DFlashConfig",
    "DFlashHead",
    "Eagle3Config",
    "Eagle3Head",
    "Head",
    "HeadDrafter",
    "MtpHead",
    "drafter_of",
]
