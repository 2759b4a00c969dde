"""Launch configurations and what each may be: readable and checkable on a machine without Triton or a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from sparvar_kernels.problem import AttentionProblem

# Most shared memory one program may take, by compute capability (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {(8, 0): 166912, (8, 6): 101376, (8, 7): 166912, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448, (12, 0): 101376}
LEAST_SHARED = 101376  # of a newer one that is not listed

Capability = tuple[int, int] | None  # of an NVIDIA GPU; None where there is none (plain CPU, Triton's interpreter)


@dataclass(frozen=True)
class CpuConfig:
    """score_elements: fp32 scores worked on at once, a share of the cache; one query tile at least."""

    score_elements: int = 1 << 20

    def why_not(self, problem: AttentionProblem, capability: Capability) -> str | None:
        """Why the CPU kernel cannot run `problem` like this, or None. It runs every shape and dtype."""
        if self.score_elements < 1:
            return f"score_elements={self.score_elements}: want >= 1"
        return None

    @staticmethod
    def space() -> dict[str, tuple[int, ...]]:
        """Parameter -> choices worth trying."""
        return {"score_elements": tuple(1 << n for n in (18, 19, 20, 21))}


@dataclass(frozen=True)
class TritonConfig:
    """block_m: query rows per program (a tile with more rows takes several); block_n: keys per step.

    num_stages: loads in flight; keys are fetched through a list, and every stage of that takes two.
    maxnreg: most registers a thread may take, so that more programs fit on a multiprocessor; 0: the compiler's choice.
    """

    block_m: int = 64
    block_n: int = 32
    num_warps: int = 4
    num_stages: int = 5
    maxnreg: int = 0

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
        if self.maxnreg and not (32 <= self.maxnreg <= 255 and self.maxnreg % 8 == 0):
            return f"maxnreg={self.maxnreg}: want 0 or a multiple of 8 from 32 to 248"
        if capability is not None and capability < (8, 0):
            return f"capability {capability[0]}.{capability[1]}: the Triton kernel wants 8.0 or newer"
        limit = SHARED_LIMIT.get(capability, LEAST_SHARED) if capability is not None else None
        if limit is not None and self.shared_bytes(problem) > limit:
            return f"{self.shared_bytes(problem)} bytes of shared memory, want at most {limit}: lower num_stages or block_n"
        return None

    def shared_bytes(self, problem: AttentionProblem) -> int:
        """Shared memory of one program, as the compiler uses it: the queries and the keys and values in flight.

        Of a list's two loads in a row each gets half the stages; in fp32 probabilities need room beside the queries. A test
        holds this against compiled binaries.
        """
        width = max(16, 1 << (problem.head_dim - 1).bit_length()) * (4 if problem.dtype == "fp32" else 2)
        deep = max(2, (self.num_stages + 1) // 2)
        rows = self.block_m * (2 if problem.dtype == "fp32" else 1) + 2 * deep * self.block_n
        return rows * width + 1024

    @property
    def options(self) -> dict[str, int]:
        """What Triton's compiler is told."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"maxnreg": self.maxnreg} if self.maxnreg else options

    @staticmethod
    def space() -> dict[str, tuple[int, ...]]:
        """Parameter -> choices worth trying."""
        return {"block_m": (64, 128), "block_n": (32, 64), "num_warps": (4, 8), "num_stages": (3, 5, 7), "maxnreg": (0, 128)}


LaunchConfig = CpuConfig | TritonConfig
