"""Heads: small modules that draft from the hidden states of the target's own forwards.

`drafter.py` drafts with any of them, on the entries that `entries.py` keeps; each family has a file, and `loading.py`
reads their files.
"""

from .drafter import HeadDrafter
from .eagle3 import Eagle3Config, Eagle3Head
from .mtp import MtpHead

__all__ = ["Eagle3Config", "Eagle3Head", "HeadDrafter", "MtpHead"]
