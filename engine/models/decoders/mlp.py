"""MLP decoder, the paper's NAR (table 3): all prompt vectors at once, from the class name alone."""

from torch import nn

from . import DECODERS
from ._base import DecoderSizes, PromptDecoder, initialise


@DECODERS.register
class MLPDecoder(PromptDecoder):
    """Two linear layers with an activation between them; it looks at no image."""

    name = "mlp"
    takes_present = True
    output = "mlp.2"
    dropout = False
    published = ("mlp.0.weight", 0)
    published_length = "mlp.2.weight"

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__(sizes)
        # The activation between the two, at 1, has no parameters: `operator` applies it.
        outputs = sizes.prompt_length * sizes.text_width
        layers = {"0": nn.Linear(sizes.width, sizes.hidden_size), "2": nn.Linear(sizes.hidden_size, outputs)}
        self.mlp = nn.ModuleDict(layers)
        initialise(self)
