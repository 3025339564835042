"""LSTM decoder (paper, table 3)."""

from torch import nn

from . import DECODERS
from ._base import RecurrentDecoder


@DECODERS.register
class LSTMDecoder(RecurrentDecoder):
    """7.1 M parameters at D = 1024, H = 512."""

    name = "lstm"
    takes_present = True
    cell = nn.LSTMCell
    published = ("lstm.weight_hh", 1)
