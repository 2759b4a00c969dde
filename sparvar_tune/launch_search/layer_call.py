"""One layer of a policy at one scale as something to call again and again on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparvar_kernels.attention import Launch, SparseAttention
from sparvar_kernels.backends.configs import TritonConfig
from sparvar_kernels.backends.dense import dense_attention
from sparvar_kernels.geometry.problem import DTYPES, AttentionProblem
from sparvar_kernels.policy import Policy
from sparvar_kernels.variants import Variant

Inputs = tuple[Tensor, Tensor, Tensor]


def random_inputs(problem: AttentionProblem, seed: int = 0, device: str = "cuda") -> Inputs:
    """q [B, H, Nq, D], k, v [B, H, Nk, D] made on the device; logits within `logit_bound` where there is one."""
    g = torch.Generator(device).manual_seed(seed)
    shape = (problem.batch, problem.heads, problem.num_keys, problem.head_dim)
    k, v = (torch.randn(shape, device=device, generator=g, dtype=torch.float32) for _ in range(2))
    q = torch.randn(*shape[:2], problem.num_queries, problem.head_dim, device=device, generator=g, dtype=torch.float32)
    if problem.logit_bound is not None:
        k = torch.nn.functional.normalize(k, dim=-1)
        q = torch.nn.functional.normalize(q, dim=-1) * (0.99 * problem.logit_bound / problem.softmax_scale)
    dtype = DTYPES[problem.dtype]
    return q.to(dtype), k.to(dtype), v.to(dtype)


class Bench:
    """One layer of a policy at one scale, on the inputs q, k, v (None: random ones).

    `call(attention(config))` is the attention of that scale; decision scales it depends on are run by `attention`. Random
    inputs that would stay in the L2 cache from call to call are kept several times over and taken in turn: in a model the
    weights of a layer's other parts go through that cache between two calls.
    """

    def __init__(
        self, policy: Policy, problems: Mapping[int, AttentionProblem], layer: int, scale_index: int,
        inputs: Inputs | None = None, l2_bytes: int = 0,
    ) -> None:  # fmt: skip
        self.policy, self.problems, self.layer, self.scale_index = policy, problems, layer, scale_index
        self.problem = problems[scale_index]
        first = random_inputs(self.problem) if inputs is None else inputs
        size = sum(t.numel() * t.element_size() for t in first)
        copies = 1 if inputs is not None else min(8, -(-2 * l2_bytes // size) or 1)
        self.sets: list[Inputs] = [first, *((first[0].clone(), first[1].clone(), first[2].clone()) for _ in range(copies - 1))]
        self.q, self.k, self.v = first
        self.turn = 0

    def attention(self, config: TritonConfig) -> SparseAttention:
        """Ready to be called at the scale, decision scales launched as by default; raises whatever a launch raises."""
        p = self.problem
        attend = SparseAttention(
            self.policy, p.schedule, softmax_scale=p.softmax_scale, logit_bound=p.logit_bound,
            launches={s: Launch("triton", config if s == self.scale_index else None) for s in range(len(p.schedule))},
        )  # fmt: skip
        for s in decision_scales(self.policy, self.layer, self.scale_index):
            d = self.problems[s]
            attend(self.q[:, :, : d.num_queries], self.k[:, :, : d.num_keys], self.v[:, :, : d.num_keys], self.layer, s)
        return attend

    def call(self, attend: SparseAttention) -> Tensor:
        return attend(*self._next(), self.layer, self.scale_index)

    def dense(self) -> Tensor:
        return dense_attention(*self._next(), self.problem)

    def _next(self) -> Inputs:
        self.turn = (self.turn + 1) % len(self.sets)
        return self.sets[self.turn]


def in_graph(way: Callable[[], object], calls: int) -> Callable[[], object]:
    """The way captured in CUDA graphs, one of each of `calls` calls in a row, replayed in turn. Raises what capturing raises."""
    graphs = []
    way()  # whatever is built at a first call is built outside
    for _ in range(calls):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            way()
        graphs.append(graph)
    turn = [0]

    def replay() -> None:
        turn[0] = (turn[0] + 1) % calls
        graphs[turn[0]].replay()

    return replay


def variants_of(policy: Policy, layer: int, scale_index: int) -> set[Variant]:
    return {policy.variant(layer, h, scale_index) for h in range(len(policy.heads[layer]))}


def decision_scales(policy: Policy, layer: int, scale_index: int) -> list[int]:
    """Scales that must run before `scale_index` in this layer."""
    decisions = (v.decision_scale for v in variants_of(policy, layer, scale_index))
    return sorted({s for s in decisions if s is not None})


def distinct_layers(policy: Policy, scale_index: int) -> dict[int, int]:
    """First layer of each kind -> how many layers are like it, at one scale.

    Layers are alike when their heads do the same here, in any order; at a decision scale also what later scales ask of it.
    """
    kinds: dict[tuple[str, ...], int] = {}
    counts: dict[int, int] = {}
    scales = sorted({scale_index, *(r.scale_index for r in policy.rules if r.scale_index > scale_index)})
    for layer, letters in enumerate(policy.heads):
        does = sorted(repr([_seen_from(policy, layer, h, s, scale_index) for s in scales]) for h in range(len(letters)))
        first = kinds.setdefault(tuple(does), layer)
        counts[first] = counts.get(first, 0) + 1
    return counts


def _seen_from(policy: Policy, layer: int, head: int, scale: int, here: int) -> Variant | None:
    """What a head's rule at `scale` is to the scale `here`: its own, or one that was decided here; else nothing."""
    variant = policy.variant(layer, head, scale)
    return variant if scale == here or variant.decision_scale == here else None
