"""Data for training and evaluation: sources of examples by index, and batches of them by grain."""

from kvjax.data.list_operations import ListOperations
from kvjax.data.pipeline import batches, shard
from kvjax.data.windows import TokenWindows

__all__ = ["ListOperations", "TokenWindows", "batches", "shard"]
