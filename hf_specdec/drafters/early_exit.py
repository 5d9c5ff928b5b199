"""`assistant_early_exit`: the target's first layers draft, on the target's own cache; see `models/early_exit.py`."""

from transformers import PreTrainedModel

from ..models.cached import CachedModel
from ..models.early_exit import EarlyExit, layers_path, resumes
from ..sampling.context import Context
from .base import Draft, DraftRequest, no_draft
from .model import ModelDrafter


class EarlyExitDrafter(ModelDrafter):
    """Drafts with the first layers of the target, its norm and its head. It has no cache and reads no prompt.

    Where the target's layers hand on nothing but hidden states, verification only runs the layers after these.

    Args:
        model: the target.
        layers: how many of its layers draft, from 1 to one less than it has.
        confidence_threshold: as for `ModelDrafter`.

    Raises:
        TypeError, ValueError: for another number of layers, or a model without a list of layers.
    """

    reads_prompts = False
    uses_target = True
    cached: CachedModel

    def __init__(self, model: PreTrainedModel, layers: int, confidence_threshold: float = 0.0):
        super().__init__(model, confidence_threshold)
        if not isinstance(layers, int) or isinstance(layers, bool):
            raise TypeError(f"`assistant_early_exit` must be an int, got {layers!r} of type {type(layers).__name__}")
        every = list(model.get_submodule(layers_path(model)).children())
        count = len(every)
        if not 1 <= layers < count:
            raise ValueError(
                f"`assistant_early_exit` must be from 1 to {count - 1}, because {type(model).__name__} has {count} "
                f"layers, got {layers}"
            )
        self.layers = layers
        self.cost_share = layers / count
        self._last_layer = every[layers - 1]

    @property
    def owner(self) -> object:
        return self._last_layer  # other numbers of layers are other drafts

    @property
    def draft_model(self) -> None:
        return None

    def start(self, call: DraftRequest, context: Context) -> None:
        target = call.target
        assert isinstance(target, CachedModel), "the session refuses other targets"
        self._serve(call)
        self._target = target
        self._exit = EarlyExit(self.model, self.layers)
        self.cached = CachedModel(self._exit.draft, target.cache, target.layout, encoded=target.encoded)
        self._resumes = not target.cache.states and target.static is None and bool(resumes(self.model, self.layers))

    def _propose(self, context: Context, max_tokens: int) -> Draft:
        target, cache = self._target, self._target.cache
        if not target.has_begun or any(target.prompt_left(context)):
            return no_draft(context)
        missing = target.missing(context)
        if target.has_states and len(set(missing)) > 1:  # all rows must be fed equally many tokens
            target.prefill(context, self._call.prefill_chunk_size)
        elif not target.has_states and max(missing) > 1:
            return no_draft(context)  # the first verification reads the prompts
        before = [cache.lengths[row] for row in context.rows]
        self.cached.later_inputs = target.later_inputs
        self._exit.forget()
        draft = super()._propose(context, max_tokens)
        if self._resumes and draft.tokens.shape[1]:
            self._keep_last(context, draft)
            target.early = self._exit
        cache.roll_back(context.rows, before)
        return draft

    def _keep_last(self, context: Context, draft: Draft) -> None:
        """Run the first layers over the last drafts too: these were not fed."""
        drafted = draft.tokens.shape[1]
        left = max(self._target.missing(context)) + drafted
        if left > 1:
            context.write_drafts(draft.tokens)
        self.cached.model = self._exit.states_only
        self.cached.forward(context, left, keep=1, ids=draft.tokens[:, -1:] if left == 1 else None)
        self.cached.model = self._exit.draft

    @property
    def refills(self) -> bool:
        return True

    def restart(self, context: Context, row: int) -> None:
        """Nothing to do: it drafts on the target's cache."""

    def read(self, context: Context, count: int) -> None:
        """Nothing to do: the target reads the text."""

    def commit(self, context: Context) -> None:
        self._target.early = None

    def unread(self, context: Context) -> int:
        return 0

    def end(self) -> None:
        if hasattr(self, "_target"):
            self._target.early = None
            del self._target, self._exit, self.cached

    def _room(self, context: Context) -> int:
        return context.max_length  # the target's positions suffice for whatever may be committed

    def _catch_up(self, context: Context, most: int) -> None:
        """Nothing to do: the target has read the text."""
