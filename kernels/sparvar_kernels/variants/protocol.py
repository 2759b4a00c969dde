"""What a variant is: one way a head may do its attention. A new one is a folder beside this file and a row in `VARIANTS`.

A variant is a frozen value of plain fields, because a policy is made of them and a profile stores them. It says what is
attended to and never how that is run: a backend runs it by what it `reads`.

    reads            what a backend does                                              who does so
    "everything"     dense attention                                                  Dense
    "fixed lists"    `lists`, known from geometry, through the gathered kernel        Csla
    "ranked lists"   `lists` of the keys its decision scale ranked                    Cs4a
    "means"          dense attention over means of keys                               Pooled
    "keys and means" `lists` of keys and of means of others, known from geometry      NearFar
    "decision"       the decision scale's output, enlarged                            Reuse
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from sparvar_kernels.geometry.problem import AttentionProblem
from sparvar_kernels.geometry.scales import ScaleSchedule, Tile
from sparvar_kernels.variants.lists import KeyLists

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing itself from Python 3.11 on

Reads = Literal["everything", "fixed lists", "ranked lists", "means", "keys and means", "decision"]
Inputs = tuple[AttentionProblem, Tensor, Tensor, Tensor]  # of a decision scale: q [B, H, Nq, D], k and v [B, H, Nk, D]


@runtime_checkable
class Variant(Protocol):
    """See the module docstring.

    kind: its name in files. meaning: raised when the same fields come to stand for other keys or other arithmetic; a profile of
    an earlier meaning is then refused. decision_scale: the earlier scale it lives on, None: none. residual: whether dense minus
    its own output there is added, enlarged. tile: the query tile that shares a list; None where there are no lists.
    """

    kind: ClassVar[str]
    meaning: ClassVar[int]
    reads: ClassVar[Reads]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def decision_scale(self) -> int | None: ...
    @property
    def residual(self) -> bool: ...
    @property
    def tile(self) -> Tile | None: ...

    def why_not(self, schedule: ScaleSchedule, scale_index: int) -> str | None:
        """Why it cannot be used at this scale, or None; that a decision scale comes before is checked by `why_not_variant`."""

    def at_decision(self, schedule: ScaleSchedule, scale_index: int) -> Variant:
        """The same rule carried to the decision grid: what is run there to make the residual."""

    def ranks(self, schedule: ScaleSchedule, scale_index: int) -> int:
        """How many of the decision scale's keys, best first, its lists at this scale look at; 0: it ranks none."""

    def lists(self, schedule: ScaleSchedule, scale_index: int, device: str, ranked: Tensor | None = None) -> KeyLists:
        """Its key lists. ranked: [B, H, T_S, R] int32, what its decision scale found, where it reads ranked lists."""

    def describe(self) -> str:
        """A few words, such as "cs4a 5% 8x8"."""

    def oracle(self, q: Tensor, k: Tensor, v: Tensor, problem: AttentionProblem, decision: Inputs | None) -> Tensor:
        """[B, H, Nq, D] in fp64 on the CPU, by the definition alone: no code is shared with `lists` or a kernel."""


class WithoutRanks:
    """What the variants that rank no keys have in common."""

    def at_decision(self, schedule: ScaleSchedule, scale_index: int) -> Self:
        return self

    def ranks(self, schedule: ScaleSchedule, scale_index: int) -> int:
        return 0


class WithoutLists(WithoutRanks):
    """What the variants that read no lists have in common; one that can be used anywhere says no more of it."""

    kind: ClassVar[str]
    tile: ClassVar[None] = None

    def why_not(self, schedule: ScaleSchedule, scale_index: int) -> str | None:
        return None

    def describe(self) -> str:
        return self.kind

    def lists(self, schedule: ScaleSchedule, scale_index: int, device: str, ranked: Tensor | None = None) -> KeyLists:
        raise NotImplementedError(f"{type(self).__name__} reads no lists")
