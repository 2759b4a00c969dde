"""The passes around attention, each made one: q/k norm + rotation + append, add + norm, SwiGLU's gate, attention to the text
or, where that is folded into products, its softmax; and of the picture's decoder those between convolutions, group norm + SiLU,
the sum with biases and the picture of twice the sides from four. And products: of 8-bit numbers with what makes its rows, and
the library's own by the fastest of its algorithms, which may add themselves to the residual stream.

They compute what the public models' own modules do, with fp32 arithmetic and one rounding at the end. On a GPU each is one
Triton kernel that reads and writes every byte once (group norm three, the input read twice); on a CPU plain torch. None is the
attention that policies are about: what is measured of that does not depend on this room.
"""

from sparvar_kernels.path.added_linear import add_linear
from sparvar_kernels.path.append import append_qkv
from sparvar_kernels.path.biased_sum import biased_sum
from sparvar_kernels.path.gated_silu import gated_silu
from sparvar_kernels.path.gated_weight import gated_weight
from sparvar_kernels.path.group_norm import group_norm_silu
from sparvar_kernels.path.interleaved import interleaved
from sparvar_kernels.path.linear import linear
from sparvar_kernels.path.residual_norm import residual_norm
from sparvar_kernels.path.scaled_product import scaled_product
from sparvar_kernels.path.scaled_rows import ScaledRows, scaled_rows
from sparvar_kernels.path.text_attention import text_attention
from sparvar_kernels.path.text_softmax import text_softmax

__all__ = [
    "ScaledRows", "add_linear", "append_qkv", "biased_sum", "gated_silu", "gated_weight", "group_norm_silu", "interleaved",
    "linear", "residual_norm", "scaled_product", "scaled_rows", "text_attention", "text_softmax",
]  # fmt: skip
