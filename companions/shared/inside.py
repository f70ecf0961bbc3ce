"""Looking into a model: hooks on the inputs of its layers, and a second model that reads along."""
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def seen_by(layers: list[nn.Module], see):
    """Calls see(layer's number, its input) at every call of a layer. If see returns something,
    that is the layer's input."""
    hooks = [layer.register_forward_pre_hook(
        lambda module, inputs, number=number: see(number, inputs[0]))
        for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Reader:
    """A model that reads B left-padded rows part by part, each token once, with its own cache."""

    def __init__(self, model, mask: Tensor):
        self.model, self.mask = model, mask                                      # mask [B, P]
        self.cache, self.read = None, 0

    def __call__(self, ids: Tensor, **options):
        """The model's output for the next n tokens [B, n]. All tokens after the mask's end
        count."""
        self.read += ids.shape[1]
        self.mask = F.pad(self.mask, (0, max(self.read - self.mask.shape[1], 0)), value=1)
        places = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]       # [B, n]
        output = self.model(ids, attention_mask=self.mask, position_ids=places,
                            past_key_values=self.cache, use_cache=True, **options)
        self.cache = output.past_key_values
        return output
