"""Streamers get what vanilla gives them: the prompt, then one token per row and step, then the end."""

from transformers.generation.streamers import BaseStreamer

from ..sampling.context import Context


class StepStreamer:
    """Feeds a streamer of transformers from rows that reach a step at different times.

    A step is passed on once every row has its token for it (finished rows: padding).
    """

    def __init__(self, streamer: BaseStreamer | None, context: Context):
        self._streamer = streamer
        self._streamed = context.prompt_width
        if streamer is not None:
            streamer.put(context.host[:, : context.prompt_width].clone())

    def advance(self, context: Context, output_width: int) -> None:
        """Pass on the steps that are complete."""
        if self._streamer is None:
            return
        complete = min([output_width, *context.active_ends])
        columns = context.host[:, self._streamed : complete].clone()  # a streamer may modify it
        for column in columns.unbind(dim=1):
            self._streamer.put(column)
        self._streamed = max(complete, self._streamed)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()
