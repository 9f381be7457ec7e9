"""Research beside meswitch: other papers' methods as codecs, and the switches that only compare.

Importing this registers all of them (`meswitch.codec.register`); an artifact of one of them opens without it being
imported, where it is installed.
"""

from meswitch_lab import bitdelta, dare, delta_come, deltazip, per_axis, rtn, svd
from meswitch_lab.settings import options

# the methods that store other tensors than the default one
CODED = tuple(module.METHOD.name for module in (bitdelta, svd, per_axis, delta_come, deltazip, dare))
METHODS = (rtn.METHOD.name, *CODED)

__all__ = ["CODED", "METHODS", "options"]
