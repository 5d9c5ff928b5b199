"""How long a model's texts may be: its positions, and rotary embeddings that change, which invalidates cached keys."""

from transformers import PreTrainedModel


def positions_of(model: PreTrainedModel) -> int | None:
    """How many tokens a model has positions for, if its config says so."""
    config = model.config.get_text_config(decoder=True)
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "max_target_positions"))
    return next(filter(None, limits), None)


def check_lengths(model: PreTrainedModel, shortest: int, longest: int) -> None:
    """Raise a ValueError for texts over which a model changes the embedding of a position.

    "dynamic" embeddings change with every token beyond the original positions, "longrope" once. Vanilla then continues
    with the current frequencies, which depend on how many tokens are in a forward.

    Args:
        model: the target.
        shortest: tokens in the shortest forward over the beginning of a row; each later forward ends after it.
        longest: the most tokens that a row may reach.
    """
    config = model.config.get_text_config(decoder=True)
    given = getattr(config, "rope_parameters", None) or {}
    for parameters in given.values() if all(isinstance(value, dict) for value in given.values()) else [given]:
        kind = parameters.get("rope_type") or "default"
        if kind == "longrope":
            limit = parameters.get("original_max_position_embeddings")
            changes = limit is not None and shortest <= limit < longest - 1  # the last token is not fed
        elif "dynamic" in kind:
            limit = getattr(config, "max_position_embeddings", None)
            changes = limit is not None and limit < longest - 1
        else:
            continue
        if changes:
            raise ValueError(
                f"The rotary embeddings of {type(model).__name__} ({kind!r}) change after {limit} tokens, and this "
                f"call may reach {longest}: strategy='spec' does not support that. Lower `max_new_tokens`, or drop "
                "the strategy"
            )
