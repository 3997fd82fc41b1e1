"""Long-context tasks: seeded generators of prompts with right answers, and their metrics."""

from __future__ import annotations

from kvjax.evaluate.tasks import needle, recall, tracking, words
from kvjax.evaluate.tasks.base import Draft, Sample, Task, contained, first_right
from kvjax.evaluate.tasks.needle import needles
from kvjax.evaluate.tasks.recall import Labelled, associative_recall, joint_recall

TASKS: dict[str, Task] = {
    task.name: task for task in needle.TASKS + tracking.TASKS + words.TASKS + recall.TASKS
}

__all__ = [
    "TASKS",
    "Draft",
    "Labelled",
    "Sample",
    "Task",
    "associative_recall",
    "contained",
    "first_right",
    "joint_recall",
    "needles",
]
