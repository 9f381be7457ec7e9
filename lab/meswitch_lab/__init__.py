"""Research beside meswitch: other papers' methods as codecs, and the switches that only compare.

Importing this registers all of them (`meswitch.codec.register`); an artifact of one of them opens without it being
imported, where it is installed.
"""

from meswitch_lab import (
    bitdelta,
    d_qrelo,
    dare,
    delta_come,
    delta_dct,
    deltazip,
    impart,
    per_axis,
    rtn,
    svd,
    ultradelta,
)
from meswitch_lab.settings import options

# the methods that store other tensors than the default one
_CODED = (bitdelta, svd, per_axis, delta_come, deltazip, dare, d_qrelo, impart, ultradelta, delta_dct)
CODED = tuple(module.METHOD.name for module in _CODED)
METHODS = (rtn.METHOD.name, *CODED)

__all__ = ["CODED", "METHODS", "options"]
