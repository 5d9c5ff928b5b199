"""hf_specdec: Hugging Face models generate faster, with unchanged output.

Importing registers `strategy="spec"` on `generate()`:

    model.generate(**inputs, assistant_model=draft, strategy="spec")
"""

from . import metrics
from .drafters import (
    Draft,
    Drafter,
    DraftRequest,
    Either,
    ModelDrafter,
    OtherTokenizerDrafter,
    ParallelDrafter,
    PromptLookupDrafter,
    SuffixDrafter,
)
from .drafters.heads import DFlashConfig, DFlashHead, Eagle3Config, Eagle3Head
from .generate.attached import attach, attached
from .generate.many import Generated, generate_many
from .generate.method import speculative
from .generate.strategy import register, unregister
from .models.kept import release
from .pairs.catalogue import Suggestion, suggest_draft, suggest_heads
from .pairs.heads import demo_head, load_head
from .pairs.pair import SpecPair, demo_pair
from .pairs.pair_file import PairConfig
from .records.stats import SpeculationStats
from .records.trace import Trace
from .sampling.matchers import MatcherProcessor
from .sampling.pure import pure
from .sampling.row_processors import RowProcessor

__version__ = "0.1.0"

__all__ = [
    "DFlashConfig",
    "DFlashHead",
    "Draft",
    "DraftRequest",
    "Drafter",
    "Eagle3Config",
    "Eagle3Head",
    "Either",
    "Generated",
    "MatcherProcessor",
    "ModelDrafter",
    "OtherTokenizerDrafter",
    "PairConfig",
    "ParallelDrafter",
    "PromptLookupDrafter",
    "RowProcessor",
    "SpecPair",
    "SpeculationStats",
    "SuffixDrafter",
    "Suggestion",
    "Trace",
    "attach",
    "attached",
    "demo_head",
    "demo_pair",
    "generate_many",
    "load_head",
    "metrics",
    "pure",
    "register",
    "release",
    "speculative",
    "suggest_draft",
    "suggest_heads",
    "unregister",
]

register()
