"""The picture decoder as one CUDA graph: at 1024 pixels and below its 300 to 700 launches take the host longer than the GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from sparvar_tune.fused.graph import captured
from sparvar_tune.fused.product import why_not_owned

MOST_PIXELS = 1024 * 1024  # of a call; larger pictures keep the GPU busy, and a graph would hold their memory for good


class DecoderGraph:
    """`decode` of one kind of latent: the first is decoded eagerly, the second is captured, later ones are replayed.

    One kind is kept at a time. A kind is what a graph cannot change any more: shape, dtype, device, autocast, PyTorch's switches
    for convolutions, and where the weights lie. why_not: why the last latent was decoded eagerly, None where it was not.
    """

    def __init__(self, decoder: nn.Module, decode: Callable[[Tensor], Tensor]) -> None:
        self.decoder, self.decode = decoder, decode
        self.why_not: str | None = "no picture was decoded yet"
        self._kind: Hashable = None
        self._graph: torch.cuda.CUDAGraph | str | None = None
        self._latent = self._picture = torch.empty(0)

    def __call__(self, z: Tensor) -> Tensor:
        """The picture of a latent [B, z, h, w], in memory of its own."""
        self.why_not = self._why_not()
        kind = self._kind_of(z)
        if self.why_not or kind != self._kind:
            self.forget()
            out = self.decode(z)
            pixels = out.shape[0] * out.shape[2] * out.shape[3]
            if self.why_not is None and pixels > MOST_PIXELS:
                self.why_not = f"{pixels} pixels, a graph is for at most {MOST_PIXELS}"
            elif self.why_not is None:
                self.why_not, self._kind = "it is the first picture of its kind", kind
            return out
        if self._graph is None:
            self._graph = self._captured(z)
        if isinstance(self._graph, str):
            self.why_not = self._graph
            return self.decode(z)
        with torch.no_grad():
            self._latent.copy_(z)
            self._graph.replay()
            return self._picture.clone()

    def forget(self) -> None:
        """Gives back the graph and its memory."""
        self._kind = self._graph = None
        self._latent = self._picture = torch.empty(0)

    def _captured(self, z: Tensor) -> torch.cuda.CUDAGraph | str:
        with torch.inference_mode(False), torch.no_grad():
            self._latent = torch.empty_like(z, requires_grad=False)
            on = torch.is_autocast_enabled("cuda")
            # what autocast casts while capturing lies in the graph's memory: nobody may find it in autocast's cache afterwards
            with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=on, cache_enabled=False):

                def run() -> None:
                    self._picture = self.decode(self._latent)

                return captured(run, z.device)

    def _kind_of(self, z: Tensor) -> Hashable:
        cudnn, autocast = torch.backends.cudnn, torch.is_autocast_enabled("cuda")
        return (
            z.shape, z.stride(), z.dtype, z.device, torch.get_autocast_dtype("cuda") if autocast else None,
            (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
            tuple((t.data_ptr(), t.dtype) for t in (*self.decoder.parameters(), *self.decoder.buffers())),
        )  # fmt: skip

    def _why_not(self) -> str | None:
        """Why launches alone would not be the whole of this decoder's work, or None."""
        for name, module in self.decoder.named_modules():
            reason = why_not_owned(module)
            if reason:
                return f"{name or type(module).__name__}: {reason}"
        return None
