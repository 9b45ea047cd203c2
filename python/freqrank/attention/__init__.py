"""Linear attention in place of softmax attention: feature maps, the layer, training, several processes."""

from freqrank.attention.approximation import KernelError, kernel_error

__all__ = ["KernelError", "kernel_error"]
