"""The public ops: thin Python functions over the native library, with checks, fakes and autograd."""

from freqrank.ops._checks import set_checks
# transforms
# attention
# linalg

__all__ = [
    "set_checks",
    # transforms
    # attention
    # linalg
]
