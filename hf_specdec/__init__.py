"""hf_specdec: Hugging Face models generate faster, and say exactly what they said before.

Importing registers `strategy="spec"` on `generate()`:

    model.generate(**inputs, assistant_model=draft, strategy="spec")
"""

from . import metrics
from .catalogue import Suggestion, suggest_draft
from .drafters import Draft, Drafter, DraftRequest, ModelDrafter, PromptLookupDrafter
from .pair_file import PairConfig
from .pairs import SpecPair, demo_pair
from .stats import SpeculationStats
from .strategy import register, speculative, unregister
from .trace import Trace

__version__ = "0.1.0"

__all__ = [
    "Draft",
    "DraftRequest",
    "Drafter",
    "ModelDrafter",
    "PairConfig",
    "PromptLookupDrafter",
    "SpecPair",
    "SpeculationStats",
    "Suggestion",
    "Trace",
    "demo_pair",
    "metrics",
    "register",
    "speculative",
    "suggest_draft",
    "unregister",
]

register()
