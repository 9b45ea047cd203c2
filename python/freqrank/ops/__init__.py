"""The public ops: thin Python functions over the native library, with checks, fakes and autograd."""

from freqrank.ops._checks import set_checks

# transforms
from freqrank.ops.transforms import dct, dctn, idct, idctn
# attention
from freqrank.ops.attention import (
    LinearAttentionState,
    dijiang_attention,
    feature_map_attention,
    linear_attention,
    linear_attention_step,
)
# linalg
from freqrank.ops.linalg import (
    CholeskyResult,
    Whitening,
    cholesky_ex,
    gram,
    gram_,
    logdet,
    solve_triangular,
    whiten,
    whiten_eigh,
)

__all__ = [
    "set_checks",
    # transforms
    "dct",
    "dctn",
    "idct",
    "idctn",
    # attention
    "LinearAttentionState",
    "dijiang_attention",
    "feature_map_attention",
    "linear_attention",
    "linear_attention_step",
    # linalg
    "CholeskyResult",
    "Whitening",
    "cholesky_ex",
    "gram",
    "gram_",
    "logdet",
    "solve_triangular",
    "whiten",
    "whiten_eigh",
]
