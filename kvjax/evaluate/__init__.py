"""Tasks and metrics."""

from kvjax.evaluate.agreement import agreement
from kvjax.evaluate.product_of_marginals import ideal_accuracy, total_correlation
from kvjax.evaluate.tasks import (
    TASKS,
    Draft,
    Labelled,
    Sample,
    Task,
    associative_recall,
    contained,
    first_right,
    joint_recall,
    needles,
)
from kvjax.evaluate.text import language_reference, load_text, samples

__all__ = [
    "TASKS",
    "Draft",
    "Labelled",
    "Sample",
    "Task",
    "agreement",
    "associative_recall",
    "contained",
    "first_right",
    "ideal_accuracy",
    "joint_recall",
    "language_reference",
    "load_text",
    "needles",
    "samples",
    "total_correlation",
]
