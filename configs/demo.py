"""`make demo`: a dozen and more methods, sized for a few minutes on two cores."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "context": 768,
            "continuation": 128,
            "offsets": ["1000", "41000"],
            "needles": 4,
            "needle_lengths": ["1024"],
            "needle_modes": ["aware"],
            "rounds": 4,
            "out": "results/demo",
        }
    )
