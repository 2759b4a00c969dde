"""Launch configurations and what each may be: readable and checkable on a machine without Triton or a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from sparvar_kernels.problem import AttentionProblem

Capability = tuple[int, int] | None  # of an NVIDIA GPU; None where there is none (plain CPU, Triton's interpreter)


@dataclass(frozen=True)
class CpuConfig:
    """score_elements: fp32 scores worked on at once, a share of the cache; one query tile at least."""

    score_elements: int = 1 << 19

    def why_not(self, problem: AttentionProblem, capability: Capability) -> str | None:
        """Why the CPU kernel cannot run `problem` like this, or None. It runs every shape and dtype."""
        if self.score_elements < 1:
            return f"score_elements={self.score_elements}: want >= 1"
        return None

    @staticmethod
    def space() -> dict[str, tuple[int, ...]]:
        """Parameter -> choices worth trying."""
        return {"score_elements": tuple(1 << n for n in (17, 18, 19, 20))}


@dataclass(frozen=True)
class TritonConfig:
    """block_m: query rows per program (a tile with more rows takes several); block_n: keys per step."""

    block_m: int = 64
    block_n: int = 64
    num_warps: int = 4
    num_stages: int = 3

    def why_not(self, problem: AttentionProblem, capability: Capability) -> str | None:
        """Why the Triton kernel cannot run `problem` like this on a GPU of `capability`, or None."""
        if problem.dtype not in ("fp32", "bf16", "fp16"):
            return f"dtype={problem.dtype}: the Triton kernel supports fp32, bf16 and fp16"
        if not 16 <= problem.head_dim <= 256:
            return f"head_dim={problem.head_dim}: the Triton kernel supports 16..256"
        for name in ("block_m", "block_n"):
            if getattr(self, name) not in (16, 32, 64, 128, 256):
                return f"{name}={getattr(self, name)}: want 16, 32, 64, 128 or 256"
        if self.num_warps not in (1, 2, 4, 8, 16):
            return f"num_warps={self.num_warps}: want 1, 2, 4, 8 or 16"
        if not 1 <= self.num_stages <= 8:
            return f"num_stages={self.num_stages}: want 1..8"
        if capability is not None and capability < (8, 0):
            return f"capability {capability[0]}.{capability[1]}: the Triton kernel wants 8.0 or newer"
        return None

    @staticmethod
    def space() -> dict[str, tuple[int, ...]]:
        """Parameter -> choices worth trying."""
        return {"block_m": (64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4)}


LaunchConfig = CpuConfig | TritonConfig
