"""Watching a model compute: which layers use their quantized weights, and which weights are read unquantized."""

import functools
import re
from collections.abc import Mapping

from torch import Tensor, nn, strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qreg_utils.quantizers.layers import QuantizedLayer

NO_VALUE_READ = re.compile(r"\.(new_\w+|\w+_like)\b")  # operations that ask a tensor for nothing but shape and type


class Watch(TorchDispatchMode):
    """In the block that it opens it sees every operation on tensors, fused kernels and functional calls included.

    ``used`` are the names of the layers that have computed with their quantized weight, ``read`` those whose latent
    weight something else than its quantizer has read. A weight that a layer shares with one that is not quantized, such
    as an embedding, is left out: it is meant to be read there.

    Hooks would not do: nn.TransformerEncoderLayer reads the weights of its Linear layers in evaluation mode, but not
    when one of them has hooks.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]):
        super().__init__()
        self.layers, self.used, self.read = layers, set(), set()
        plain = (module for module in model.modules() if not isinstance(module, QuantizedLayer))
        shared = {id(parameter) for module in plain for parameter in module.parameters(recurse=False)}
        weights = {name: layer.weight for name, layer in layers.items() if id(layer.weight) not in shared}
        self._addresses = {name: range(w.data_ptr(), w.data_ptr() + w.nbytes) for name, w in weights.items()}
        self._rounding = 0  # weights are being quantized

    def __enter__(self) -> "Watch":
        for name, layer in self.layers.items():
            layer.quantized_weight = functools.partial(self._quantized_weight, name, layer)
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        for layer in self.layers.values():
            del layer.quantized_weight
        super().__exit__(*exception)

    def _quantized_weight(self, name: str, layer: QuantizedLayer) -> Tensor:
        self.used.add(name)
        self._rounding += 1
        try:
            return type(layer).quantized_weight(layer)
        finally:
            self._rounding -= 1

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self._rounding and not NO_VALUE_READ.search(str(operation)):
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and tensor.layout is strided:
                    start = tensor.data_ptr()
                    self.read.update(name for name, weight in self._addresses.items() if start in weight)
        return operation(*args, **kwargs)
