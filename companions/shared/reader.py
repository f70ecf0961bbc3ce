"""A model that reads along while answers are written: monitor.py's and neurons.py's."""
import torch.nn.functional as F
from torch import Tensor


class Reader:
    """Reads B left-padded rows part by part, each token once, with a cache of its own."""

    def __init__(self, model, mask: Tensor):
        self.model, self.mask = model, mask                                      # mask [B, P]
        self.cache, self.read = None, 0

    def __call__(self, ids: Tensor, **options):
        """The model's output for the next n tokens [B, n]; behind the mask's end all count."""
        self.read += ids.shape[1]
        self.mask = F.pad(self.mask, (0, max(self.read - self.mask.shape[1], 0)), value=1)
        places = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]       # [B, n]
        output = self.model(ids, attention_mask=self.mask, position_ids=places,
                            past_key_values=self.cache, use_cache=True, **options)
        self.cache = output.past_key_values
        return output
