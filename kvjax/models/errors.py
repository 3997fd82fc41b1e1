"""The one exception that reading a checkpoint raises."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint is malformed, incomplete, or not one kvjax can run.

    The message names the file, what in it, the value it has and what was expected.
    """
