"""hf_specdec: Hugging Face models generate faster, and say exactly what they said before.

Importing registers `strategy="spec"` on `generate()`:

    model.generate(**inputs, assistant_model=draft, strategy="spec")
"""

from .drafters import Draft, Drafter, DraftRequest, ModelDrafter, PromptLookupDrafter
from .pairs import demo_pair
from .stats import SpeculationStats
from .strategy import register, speculative, unregister
from .trace import Trace

__version__ = "0.1.0"

__all__ = [
    "Draft",
    "DraftRequest",
    "Drafter",
    "ModelDrafter",
    "PromptLookupDrafter",
    "SpeculationStats",
    "Trace",
    "demo_pair",
    "register",
    "speculative",
    "unregister",
]

register()
