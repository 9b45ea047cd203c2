"""The public ops: thin Python functions over the native library, with checks, fakes and autograd."""

from freqrank.ops._checks import set_checks
from freqrank.ops.attention import (
    LinearAttentionState,
    dijiang_attention,
    dijiang_attention_step,
    feature_map_attention,
    feature_map_attention_step,
    linear_attention,
    linear_attention_step,
)
from freqrank.ops.linalg import (
    CholeskyResult,
    CholeskySolution,
    Whitening,
    cholesky_ex,
    cholesky_solve_ex,
    gram,
    gram_,
    logdet,
    solve_triangular,
    whiten,
    whiten_eigh,
)
from freqrank.ops.transforms import dct, dctn, describe_plan, idct, idctn

__all__ = [
    "CholeskyResult",
    "CholeskySolution",
    "LinearAttentionState",
    "Whitening",
    "cholesky_ex",
    "cholesky_solve_ex",
    "dct",
    "dctn",
    "describe_plan",
    "dijiang_attention",
    "dijiang_attention_step",
    "feature_map_attention",
    "feature_map_attention_step",
    "gram",
    "gram_",
    "idct",
    "idctn",
    "linear_attention",
    "linear_attention_step",
    "logdet",
    "set_checks",
    "solve_triangular",
    "whiten",
    "whiten_eigh",
]
