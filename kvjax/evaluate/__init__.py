"""Tasks and metrics."""

from kvjax.evaluate.agreement import agreement
from kvjax.evaluate.needles import Needle, found, needles
from kvjax.evaluate.product_of_marginals import ideal_accuracy, total_correlation
from kvjax.evaluate.text import language_reference, load_text, samples

__all__ = [
    "Needle",
    "agreement",
    "found",
    "ideal_accuracy",
    "language_reference",
    "load_text",
    "needles",
    "samples",
    "total_correlation",
]
