"""GRU decoder, the paper's (eqs. 3 and 4)."""

from torch import nn

from . import DECODERS
from ._base import RecurrentDecoder


@DECODERS.register
class GRUDecoder(RecurrentDecoder):
    """6.3 M parameters at D = 1024, H = 512."""

    name = "gru"
    takes_present = True
    cell = nn.GRUCell
    published = ("gru.weight_hh", 1)
