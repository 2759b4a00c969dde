"""Launch configurations and what each may be: readable and checkable on a machine without Triton or a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata

from sparvar_kernels.geometry.problem import AttentionProblem

# Most shared memory one program may take, by compute capability (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {(8, 0): 166912, (8, 6): 101376, (8, 7): 166912, (8, 9): 101376, (9, 0): 232448, (10, 0): 232448, (12, 0): 101376}
LEAST_SHARED = 101376  # of a newer one that is not listed
REGISTERS = 65536  # of a Hopper multiprocessor
FETCHERS = 4  # warps

Row = tuple[tuple[str, int], ...]  # (parameter, value), by name
Capability = tuple[int, int] | None  # of an NVIDIA GPU; None where there is none (plain CPU, Triton's interpreter)


@dataclass(frozen=True)
class CpuConfig:
    """score_elements: fp32 scores worked on at once, a share of the cache; one query tile at least."""

    score_elements: int = 1 << 20

    def to_row(self) -> Row:
        """As a profile's row keeps it."""
        return tuple(sorted(vars(self).items()))

    @classmethod
    def from_row(cls, row: Row) -> CpuConfig:
        """The inverse of `to_row`. Raises TypeError for a field that is none of its."""
        return cls(**dict(row))

    def why_not(self, problem: AttentionProblem, capability: Capability) -> str | None:
        """Why the CPU kernel cannot run `problem` like this, or None. It runs every shape and dtype."""
        if self.score_elements < 1:
            return f"score_elements={self.score_elements}: want >= 1"
        return None

    @staticmethod
    def defaults() -> tuple[CpuConfig, ...]:
        """The default, then what is tried where that is illegal."""
        return (CpuConfig(),)

    @staticmethod
    def space() -> dict[str, tuple[int, ...]]:
        """Parameter -> choices worth trying."""
        return {"score_elements": tuple(1 << n for n in (18, 19, 20, 21))}


@dataclass(frozen=True)
class TritonConfig:
    """block_m: query rows per program (a tile with more rows takes several); block_n: keys per step.

    num_stages: loads in flight; keys are fetched through a list, and every stage of that takes two.
    maxnreg: most registers a thread may take, so that more programs fit on a multiprocessor; 0: the compiler's choice.
    fetchers: warps that do nothing but fetch, 4 or 0 (every warp does all). With them num_warps counts those that multiply,
    and num_stages blocks of keys or of values in shared memory. For Hopper GPUs.
    """

    block_m: int = 64
    block_n: int = 32
    num_warps: int = 4
    num_stages: int = 5
    maxnreg: int = 0
    fetchers: int = 0

    def to_row(self) -> Row:
        """As a profile's row keeps it."""
        return tuple(sorted(vars(self).items()))

    @classmethod
    def from_row(cls, row: Row) -> TritonConfig:
        """The inverse of `to_row`. Raises TypeError for a field that is none of its."""
        return cls(**dict(row))

    def why_not(self, problem: AttentionProblem, capability: Capability) -> str | None:
        """Why the Triton kernel cannot run `problem` like this on a GPU of `capability`, or None."""
        if problem.dtype not in ("fp32", "bf16", "fp16"):
            return f"dtype={problem.dtype}: the Triton kernel supports fp32, bf16 and fp16"
        if not 16 <= problem.head_dim <= 256:
            return f"head_dim={problem.head_dim}: the Triton kernel supports 16..256"
        if self.fetchers not in (0, FETCHERS):
            return f"fetchers={self.fetchers}: want 0 or {FETCHERS}"
        reason = self._why_not_fetching(problem, capability) if self.fetchers else self._why_not_plain(capability)
        if reason:
            return reason
        limit = SHARED_LIMIT.get(capability, LEAST_SHARED) if capability is not None else None
        if limit is not None and self.shared_bytes(problem) * self.resident(problem) > limit:
            many = f" {self.resident(problem)} times" if self.resident(problem) > 1 else ""
            return f"{self.shared_bytes(problem)} bytes of shared memory{many}, want at most {limit}: lower num_stages or block_n"
        return None

    def _why_not_plain(self, capability: Capability) -> str | None:
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
        return None

    def _why_not_fetching(self, problem: AttentionProblem, capability: Capability) -> str | None:
        where = f"fetchers={self.fetchers}:"
        if capability != (9, 0):
            return f"{where} wants a Hopper GPU (9.0), got {'none' if capability is None else '.'.join(map(str, capability))}"
        if problem.dtype == "fp32" or problem.head_dim not in (64, 128):
            return f"{where} wants bf16 or fp16 and head_dim 64 or 128, got {problem.dtype} and {problem.head_dim}"
        if (self.block_m, self.num_warps) not in ((64, 4), (128, 8)) or self.block_n not in (32, 64, 128):
            got = f"{self.block_m}, {self.num_warps} and {self.block_n}"
            return f"{where} wants block_m 64 with 4 warps or 128 with 8, and block_n 32, 64 or 128; got {got}"
        if problem.num_queries >= 1 << 20:
            return f"{where} wants fewer than 2**20 queries, got {problem.num_queries}"
        if not 3 <= self.num_stages <= 16 or self.maxnreg:
            return f"{where} wants num_stages 3..16 and maxnreg 0, got {self.num_stages} and {self.maxnreg}"
        return _why_not_gluon()

    def shared_bytes(self, problem: AttentionProblem) -> int:
        """Shared memory of one program, as the compiler uses it: the queries and the keys and values in flight.

        Of a list's two loads in a row each gets half the stages; in fp32 probabilities need room beside the queries. Warps
        that fetch bring the next queries before these are done with. A test holds this against compiled binaries.
        """
        width = max(16, 1 << (problem.head_dim - 1).bit_length()) * (4 if problem.dtype == "fp32" else 2)
        if self.fetchers:
            return (2 * self.block_m + self.num_stages * self.block_n) * width + 1024
        deep = max(2, (self.num_stages + 1) // 2)
        rows = self.block_m * (2 if problem.dtype == "fp32" else 1) + 2 * deep * self.block_n
        return rows * width + 1024

    def resident(self, problem: AttentionProblem) -> int:
        """Programs meant to be on a multiprocessor together where warps fetch; they stay till all work is done."""
        return 1 if not self.fetchers or self.block_m == 128 else 2 if max(problem.head_dim, self.block_n) > 64 else 3

    def registers(self, problem: AttentionProblem) -> tuple[int, int, int]:
        """(of a thread at launch, of a thread that multiplies, of one that fetches) where warps fetch."""
        groups = self.block_m // 64
        each = REGISTERS // (self.resident(problem) * (groups + 1) * 128) // 8 * 8
        fetching = {1: 56 + self.block_n // 4, 2: 64, 3: 48}[self.resident(problem)]
        return each, min(240, (each * (groups + 1) - fetching) // groups // 8 * 8), fetching

    def options(self, problem: AttentionProblem) -> dict[str, int]:
        """What Triton's compiler is told."""
        if self.fetchers:
            return {"num_warps": 4, "maxnreg": self.registers(problem)[0]}  # the other warps belong to the kernel's partitions
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"maxnreg": self.maxnreg} if self.maxnreg else options

    @property
    def plain(self) -> TritonConfig:
        """For launches that no fetching kernel can do."""
        return TritonConfig() if self.fetchers else self

    @staticmethod
    def defaults() -> tuple[TritonConfig, ...]:
        """The default, then what is tried where that does not fit: fewer loads in flight first, smaller blocks after."""
        blocks = ((64, 32), (32, 32), (32, 16), (16, 16))
        return tuple(TritonConfig(m, n, 4, stages) for m, n in blocks for stages in (5, 3, 2, 1))

    @staticmethod
    def space() -> dict[str, tuple[int, ...]]:
        """Parameter -> choices worth trying, of the kernel whose warps do all."""
        return {"block_m": (64, 128), "block_n": (32, 64), "num_warps": (4, 8), "num_stages": (3, 5, 7), "maxnreg": (0, 128)}

    @staticmethod
    def fetching(problem: AttentionProblem) -> tuple[TritonConfig, ...]:
        """Those worth trying where warps fetch: as many stages as fit."""
        sizes = ((64, 64), (64, 128), (128, 64), (128, 128))
        made = [[TritonConfig(m, n, m // 16, stages, fetchers=FETCHERS) for stages in range(3, 13)] for m, n in sizes]
        legal = [[c for c in group if c.why_not(problem, (9, 0)) is None] for group in made]
        return tuple(group[-1] for group in legal if group)


@lru_cache(maxsize=1)
def _why_not_gluon() -> str | None:
    """Why this machine's Triton cannot compile the fetching kernel; None also where there is no Triton to ask."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None
    new = tuple(int(n) for n in version.split(".")[:2]) >= (3, 6)
    return None if new else f"fetchers: want Triton 3.6 or newer, got {version}"


LaunchConfig = CpuConfig | TritonConfig
