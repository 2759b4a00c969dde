"""The passes around attention, each made one: q/k norm + rotation + append, add + norm, SwiGLU's gate, attention to the text.

They compute what the public models' own modules do, with fp32 arithmetic and one rounding at the end. On a GPU each is one
Triton kernel that reads and writes every byte once; on a CPU plain torch. None is the attention that policies are about: what
is measured of that does not depend on this room.
"""

from sparvar_kernels.path.append import append_qkv
from sparvar_kernels.path.gated_silu import gated_silu
from sparvar_kernels.path.residual_norm import residual_norm
from sparvar_kernels.path.text_attention import text_attention

__all__ = ["append_qkv", "gated_silu", "residual_norm", "text_attention"]
