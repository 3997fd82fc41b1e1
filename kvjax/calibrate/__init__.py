"""Constants that some methods need before they run, found from a model and text.

    constants = CALIBRATIONS["kvquant"](bits=3)(model, batches)   # the method's own arguments
    cache = init_cache(config, kvquant(bits=3), batch, length, prompt, constants=constants)

`save`, `load` and `find` keep them in folders that say for which model they were made. Where the
weights are enough, `find` makes them at once.

>>> CALIBRATIONS["kvquant"](bits=3).names[:2]
('kvquant_key_centre', 'kvquant_key_range')
>>> CALIBRATIONS["rotatekv"](bits=4).names
('rotatekv_order',)
"""

from collections.abc import Callable

from kvjax.calibrate.base import PROGRAM, Calibration, complete, find, folder_of, load, save
from kvjax.calibrate.compress_kv_heads import compress_kv_heads
from kvjax.calibrate.cskv import cskv
from kvjax.calibrate.double_sparsity import double_sparsity
from kvjax.calibrate.kvquant import kvquant
from kvjax.calibrate.rotatekv import rotatekv

CALIBRATIONS: dict[str, Callable[..., Calibration]] = {
    f.__name__: f for f in (kvquant, rotatekv, compress_kv_heads, cskv, double_sparsity)
}

__all__ = [
    "CALIBRATIONS",
    "PROGRAM",
    "Calibration",
    "complete",
    "find",
    "folder_of",
    "load",
    "save",
]
