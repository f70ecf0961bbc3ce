"""Which tensors are alive, and how many bytes they take at the worst moment."""
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Notes the storages of tensors from birth to death: bytes now and at the worst moment, and the
    largest storage. `known` tensors do not count."""

    def __init__(self, known=()):
        super().__init__()
        self.alive = {tensor.untyped_storage()._cdata: 0 for tensor in known}  # bytes of each
        self.now = 0
        self.peak = 0
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.note(value.untyped_storage())
        return result

    def note(self, storage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()
        self.alive[key] = size
        weakref.finalize(storage, self.end, key)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.largest = max(self.largest, size)

    def end(self, key) -> None:
        self.now -= self.alive.pop(key)
