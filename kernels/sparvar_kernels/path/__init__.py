"""The passes around attention that only move bytes, each made one: q/k norm + rotation + append, and add + norm.

They compute what the public models' own modules do, with fp32 arithmetic and one rounding at the end. On a GPU each is one
Triton kernel that reads and writes every byte once; on a CPU plain torch. None is attention: what is measured of attention
does not depend on this room.
"""

from sparvar_kernels.path.append import append_qkv
from sparvar_kernels.path.residual_norm import residual_norm

__all__ = ["append_qkv", "residual_norm"]
