"""lm-eval's model type `hf` with speculation, as the type `hf-spec`. Needs the package lm-eval.

    python -m hf_specdec.integrations.lm_eval --model hf-spec --model_args pretrained=T,draft=D --tasks ...

is the command `lm_eval`, which imports no types of other packages by itself, with this one added.
"""

from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from ..options import OPTION_NAMES
from ..records.stats import SpeculationStats


@register_model("hf-spec")
class SpeculativeHFLM(HFLM):
    """`hf` whose `generate()` calls speculate: the same answers, in fewer forwards of the model.

    Args:
        args, kwargs: as for `hf`; and options of speculation by their names in `generate()`, such as
            `num_assistant_tokens`.
        draft: a draft's Hub id or local path, "auto" for the one that the target's pair file or the catalogue names, a
            loaded model or a `Drafter`. Without one, drafts are looked up in the text.

    Attributes:
        speculation_stats: of all calls so far; results have it as `config.speculation`.
    """

    def __init__(self, *args: Any, draft: Any = None, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTION_NAMES if name in kwargs}
        self.speculation_stats = SpeculationStats()
        own = {"strategy": "spec", "assistant_model": draft, "speculation_stats": self.speculation_stats}
        self._speculation: dict[str, Any] = own | options
        super().__init__(*args, **kwargs)

    def _model_generate(self, *args: Any, **generation_kwargs: Any) -> Tensor:
        return super()._model_generate(*args, **self._speculation | generation_kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes about a model into its results."""
        counters = self.speculation_stats.to_dict()
        for name in ("per_row", "iterations"):  # of thousands of calls
            del counters[name]
        return super().get_model_info() | {"speculation": counters}


if __name__ == "__main__":
    cli_evaluate()
