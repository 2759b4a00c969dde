"""The picture decoder of the public models: between two convolutions one pass, which writes what the next convolution reads.

    conv_in -> mid -> levels of residual blocks, attention and upsampling -> norm_out -> SiLU -> conv_out

Under autocast PyTorch runs the norm and SiLU in fp32: six passes over fp32 pictures where one of half the width does. On a GPU it
adds a convolution's bias in a pass of its own; those of residual blocks go into the norm and the sum behind them. Modules are
known by their attributes (the taming-transformers family: Infinity, VAR and HART draw with it), and since code between modules
cannot be read off them, a small random latent is decoded both ways when the path is put on. Attention and convolutions that
are more than their weights are the model's own modules, called as they are; so is upsampling but by nearest pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparvar_kernels.path import biased_sum, group_norm_silu
from sparvar_kernels.path.biased_sum import why_not_biased_sum
from sparvar_kernels.path.door import FLOATS, form
from sparvar_kernels.path.pictures import biased
from sparvar_tune.adapters.instance_forward import Undos, replace_method
from sparvar_tune.catalog.names import first_line
from sparvar_tune.fused.compile_ahead import Ahead, compile_ahead
from sparvar_tune.fused.convolution import bare, bias_apart, conv_of, enlarged, enlarges, few_outputs, is_enlarging
from sparvar_tune.fused.module_graph import ModuleGraph
from sparvar_tune.fused.product import why_not_owned
from sparvar_tune.generation.scaled_product import multiplied_in

SHORTCUTS = ("nin_shortcut", "conv_shortcut")
# A latent of the check, and how far both ways may lie apart. At VAR's depth roundings alone make 0.058 in bf16, 0.007 in fp16
# (whose fraction is as long as that of TF32, which fp32 convolutions may use); GELU, ReLU or hard swish for SiLU make 0.7.
LATENT = (4, 3)
APART = {torch.float32: 0.05, torch.bfloat16: 0.2, torch.float16: 0.05}
AT_ONCE = 4  # of its 28 binaries, which take 10 s of a core and are needed last


def decoder_of(model: Any, given: Mapping[str, Any]) -> nn.Module | None:
    """The decoder that this call of generate draws with: of its `vae`, else of the model's own; None if neither has one."""
    vae = given.get("vae")
    if vae is None:
        vae = next(iter(getattr(model, "vae_proxy", ())), None)
    decoder = getattr(vae, "decoder", None)
    return decoder if isinstance(decoder, nn.Module) else None


def attach_decoder(decoder: nn.Module, channels_last: bool = True, graphs: bool = True) -> FusedDecoder:
    """Puts the fused path into a live decoder; `undo()` of what it returns takes it out, exactly.

    channels_last: weights of 3 x 3 convolutions are laid out so, values untouched, which makes all pictures within the decoder
    channels_last. `undo()` lays them out as before. graphs: on a GPU, pictures of a kind are replayed as one CUDA graph from the
    second one on, unless that would hold much memory or somebody's hook is in the decoder.
    Raises ValueError in one line, with nothing changed, for a decoder that it does not know whole.
    """
    return Untouched(decoder).attach(channels_last, graphs)


class Untouched:
    """A decoder before anything in it was changed, with its own picture of a small latent.

    Raises ValueError, as `attach_decoder` does, for modules that are not the family's; what else is wrong `attach` says.
    Under the caller's autocast, so that it needs what later pictures need. On a GPU our kernels are compiled meanwhile.
    likely: sides (height, width) of the latent that is to be decoded, and how many. after: returns when compiling may begin, so
    that what is needed sooner and takes longer goes first. aside: the picture is drawn by a thread of its own, on the caller's
    stream, on which nothing may be captured until `wait` returns.
    """

    def __init__(
        self, decoder: nn.Module, likely: tuple[int, int, int] | None = None, after: Callable[[], None] | None = None,
        aside: bool = False,
    ) -> None:  # fmt: skip
        reason = why_not_decoder(decoder)
        if reason:
            raise self._refusal(decoder, reason)
        self.decoder = decoder
        weight: Tensor = conv_of(decoder.conv_in).weight  # type: ignore[union-attr]
        self.z = torch.randn(1, weight.shape[1], *LATENT, generator=torch.Generator().manual_seed(0)).to(weight)
        self.dtype = multiplied_in(self.z)
        if self.z.is_cuda:
            shapes = [tuple(self.z.shape)]
            if likely is not None:
                shapes.append((likely[2], weight.shape[1], *likely[:2]))
            builds = (b for shape in shapes for b in decoder_builds(decoder, shape, self.dtype))
            Ahead(builds, self.z.device, after, AT_ONCE)
        self._reason: str | None = None
        self._thread: threading.Thread | None = None
        if aside:
            stream = torch.cuda.current_stream(self.z.device) if self.z.is_cuda else None
            inference = torch.is_inference_mode_enabled()
            self._thread = threading.Thread(target=self._draw_on, args=(stream, inference), daemon=True)
            self._thread.start()
        else:
            self._draw()

    def _draw(self) -> None:
        with torch.no_grad(), self._autocast():
            try:
                self.want: Tensor = self.decoder(self.z)
            except Exception as error:
                self._reason = f"decoding a small latent: {first_line(error)}"

    def _draw_on(self, stream: torch.cuda.Stream | None, inference: bool) -> None:
        """In another thread: cuDNN plans and loads for half a second there, without Python's lock."""
        with torch.cuda.stream(stream), torch.inference_mode(inference):
            self._draw()

    def wait(self) -> None:
        """Returns when the picture is drawn: from then on the decoder may be changed."""
        if self._thread is not None:
            self._thread.join()

    def attach(self, channels_last: bool = True, graphs: bool = True) -> FusedDecoder:
        """See `attach_decoder`."""
        self.wait()
        if self._reason is not None:
            raise self._refusal(self.decoder, self._reason)
        path = None
        with torch.no_grad(), self._autocast():
            try:
                path = FusedDecoder(self.decoder, channels_last, graphs)
                path.compile(self.z)
                reason = _why_not_alike(path(self.z), self.want)
            except Exception as error:
                reason = f"decoding a small latent: {first_line(error)}"
        if path is None or reason:
            if path is not None:
                path.undo()
            raise self._refusal(self.decoder, reason or "")
        return path

    def _autocast(self) -> torch.autocast:
        """As it was when this was made; nobody finds copies of weights afterwards."""
        on = self.dtype != self.z.dtype
        return torch.autocast(self.z.device.type, self.dtype if on else None, enabled=on, cache_enabled=False)

    @staticmethod
    def _refusal(decoder: nn.Module, reason: str) -> ValueError:
        return ValueError(f"{type(decoder).__name__}: {reason}")


def why_not_decoder(decoder: Any) -> str | None:
    """Why a decoder is not one of the family, as far as its modules tell, or None."""
    missing = [name for name in ("conv_in", "mid", "up", "norm_out", "conv_out") if not hasattr(decoder, name)]
    if missing:
        return f"it has no {', '.join(missing)}; want a decoder of the taming-transformers family"
    for name in ("conv_in", "conv_out"):
        if conv_of(getattr(decoder, name)) is None:
            return f"{name} is {type(getattr(decoder, name)).__name__}, want a 2-D convolution"
    reason = _why_not_norm(decoder.norm_out) or why_not_owned(decoder)
    if reason:
        return f"norm_out: {reason}" if norm_of(decoder.norm_out) is None else reason
    if not all(hasattr(decoder.mid, name) for name in ("block_1", "block_2")):
        return "mid has no block_1 and block_2"
    if not len(decoder.up) or not all(hasattr(level, "block") for level in decoder.up):
        return "up is not a list of levels, each with a list of residual blocks"
    for i, level in enumerate(decoder.up):
        if len(getattr(level, "attn", ())) not in (0, len(level.block)):
            return f"up.{i} has {len(level.attn)} attention blocks for {len(level.block)} residual ones"
    for name, block in _blocks(decoder):
        reason = _why_not_block(block)
        if reason:
            return f"{name}: {reason}"
    for t in decoder.parameters():
        if t.dtype not in FLOATS or t.device.type not in ("cpu", "cuda"):
            return f"its weights are {t.dtype} on {t.device}, want {', '.join(map(str, FLOATS))} on a CPU or a CUDA GPU"
    if any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in decoder.modules()):
        return "it is in training mode and drops at random, want eval() before"
    return None


class FusedDecoder(Undos):
    """A decoder on the fused path. reason: why the last picture was decoded by the model's own code, None if it was not."""

    def __init__(self, decoder: Any, channels_last: bool, graphs: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.graph = ModuleGraph(decoder) if graphs else None
        self.reason: str | None = None
        self.compiled: set[torch.Size] = set()  # latents whose binaries were made
        self.doubling: dict[Any, Any] = {}  # upsamplings that `enlarged` can do, and what they were
        if channels_last:
            for module in decoder.modules():
                if isinstance(module, nn.Conv2d):
                    self.add(ChannelsLast(module))
        for module in decoder.modules():
            if is_attention(module):
                self.add(replace_method(module.norm, "forward", _Normed(module.norm)))
        upsamplings = [level.upsample for level in reversed(decoder.up) if hasattr(level, "upsample")]
        self.doubling |= {module: type(module) for i, module in enumerate(upsamplings) if _is_doubling(module, 2**i)}
        self.add(replace_method(decoder, "forward", self._forward))

    def __call__(self, z: Tensor) -> Tensor:
        """The picture of a latent [B, z, h, w]."""
        decoder = self.decoder
        x = decoder.conv_in(z)
        x = _residual(decoder.mid.block_1, x)
        if getattr(decoder.mid, "attn_1", None) is not None:
            x = decoder.mid.attn_1(x)
        x = _residual(decoder.mid.block_2, x)
        for level in reversed(decoder.up):
            attentions = getattr(level, "attn", ())
            for i, block in enumerate(level.block):
                x = _residual(block, x)
                if len(attentions):
                    x = attentions[i](x)
            if hasattr(level, "upsample"):
                x = self._upsampled(level.upsample, x)
        # contiguous as the model's own code gives it: a caller may view() it
        return few_outputs(decoder.conv_out, _normed(decoder.norm_out, x))

    def _upsampled(self, module: Any, x: Tensor) -> Tensor:
        known = self.doubling.get(module) is type(module) and _may_double(module) and enlarges(module.conv, *x.shape[2:])
        out: Tensor = enlarged(module.conv, x) if known else module(x)
        return out

    def compile(self, z: Tensor) -> None:
        """Makes ready what latents of z's shape launch."""
        if not z.is_cuda or z.shape in self.compiled:
            return
        self.compiled.add(z.shape)
        compile_ahead(decoder_builds(self.decoder, tuple(z.shape), multiplied_in(z)), z.device)

    def _forward(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        self.reason = self._why_not(args, kwargs)
        if self.reason:
            return inner(*args, **kwargs)
        z: Tensor = args[0]
        self.compile(z)
        return self(z) if self.graph is None or not z.is_cuda else self.graph(self, z)

    def _why_not(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or args[0].ndim != 4:
            return "it was called with something else than one latent [B, z, h, w]"
        z = args[0]
        if z.dtype not in FLOATS or z.device.type not in ("cpu", "cuda"):
            return f"the latent is {z.dtype} on {z.device}"
        if torch.is_grad_enabled() and (z.requires_grad or any(t.requires_grad for t in self.decoder.parameters())):
            return "a gradient is asked for; call it under torch.no_grad() or torch.inference_mode()"
        return None


def decoder_builds(decoder: Any, latent: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    """Binaries (`backends.triton.binary.Build`) that a picture of `latent` [B, z, h, w] launches, to be compiled ahead.

    dtype: what convolutions make, autocast's where it is on. Every upsampling is taken to double both sides, and pictures to
    be channels_last; what is foreseen wrongly costs its compilation, what is missed is compiled when it is needed.
    """
    from sparvar_kernels.path.triton.biased_sum import biased_sum_build
    from sparvar_kernels.path.triton.group_norm import Cut, group_norm_builds
    from sparvar_kernels.path.triton.interleaved import interleaved_build

    batch, _, height, width = latent
    plain = {id(norm_of(m.norm)) for m in decoder.modules() if is_attention(m)}
    blocks = {id(block): block for _, block in _blocks(decoder)}
    adds = {id(norm_of(block.norm2)): _dtype(bias_apart(block.conv1)) for block in blocks.values()}
    sides: list[list[nn.Module]] = [[decoder.mid]]  # what runs before the first upsampling, between it and the second, ...
    for level in reversed(decoder.up):
        sides[-1].append(level)
        if hasattr(level, "upsample"):
            sides.append([])
    sides[-1].append(decoder.norm_out)
    found: dict[Any, None] = {}
    for i, parts in enumerate(sides):
        for norm in (m for part in parts for m in part.modules() if isinstance(m, nn.GroupNorm)):
            shape = Cut(batch, norm.num_channels, height * width * 4**i, last=True)
            types = _dtype(norm.weight), _dtype(norm.bias), id(norm) not in plain, shape.aligned, adds.get(id(norm))
            found |= dict.fromkeys(group_norm_builds(shape, norm.num_groups, dtype, dtype, *types))
        for block in (blocks[id(m)] for part in parts for m in part.modules() if id(m) in blocks):
            conv, beside, own = conv_of(block.conv2), _dtype(bias_apart(_shortcut(block))), _dtype(bias_apart(block.conv2))
            assert conv is not None
            shape = Cut(batch, conv.out_channels, height * width * 4**i, last=True)
            if beside is not None or own is not None:
                found[biased_sum_build(shape, dtype, beside, own, shape.aligned)] = None
        upsamplings: list[Any] = [getattr(part, "upsample", None) for part in parts]
        for module in filter(_may_double, upsamplings):
            if enlarges(module.conv, height << i, width << i):
                conv = conv_of(module.conv)
                assert conv is not None
                shape = Cut(batch, conv.out_channels, height * width * 4 ** (i + 1), last=True)
                found[interleaved_build(shape, dtype, _dtype(bias_apart(module.conv)), shape.aligned)] = None
    return list(found)


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


class ChannelsLast:
    """The weight of a convolution, laid out channels_last. Undone, it has the strides it had, and the values it has by then."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.weight: Any = module._parameters.get("weight")
        self.before: tuple[int, ...] | None = None
        t = self.weight
        if type(t) is nn.Parameter and t.is_contiguous() and not t.is_contiguous(memory_format=torch.channels_last):
            self.before = t.stride()
            _, channels, height, width = t.shape
            self._lay((height * width * channels, 1, width * channels, channels))

    def _lay(self, strides: tuple[int, ...]) -> None:
        t = self.weight
        with torch.inference_mode(False), torch.no_grad():  # memory made in inference mode could not learn afterwards
            t.data = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)

    def undo(self) -> None:
        if self.before is not None and self.weight.is_contiguous(memory_format=torch.channels_last):
            self._lay(self.before)
        self.before = None


def norm_of(module: Any) -> nn.GroupNorm | None:
    """The GroupNorm that a module is or, as Infinity's `Normalize`, holds; of one picture both of its norm_axis are the same."""
    inner = getattr(module, "norm", module)
    return inner if type(inner) is nn.GroupNorm else None


def is_attention(module: Any) -> bool:
    """A block whose norm goes into convolutions and nowhere else: (norm, qkv or q, k, v, proj_out)."""
    products = ("qkv",) if hasattr(module, "qkv") else ("q", "k", "v")
    known = all(conv_of(getattr(module, name, None)) is not None for name in (*products, "proj_out"))
    return known and _why_not_norm(getattr(module, "norm", None)) is None


def _blocks(decoder: Any) -> Iterator[tuple[str, Any]]:
    yield from (("mid.block_1", decoder.mid.block_1), ("mid.block_2", decoder.mid.block_2))
    for i, level in enumerate(decoder.up):
        yield from ((f"up.{i}.block.{j}", block) for j, block in enumerate(level.block))


def _why_not_norm(module: Any) -> str | None:
    norm = norm_of(module)
    if norm is None:
        return f"its norm is {type(module).__name__}, want GroupNorm"
    return why_not_owned(module) or why_not_owned(norm)


def _why_not_block(block: Any) -> str | None:
    for name in ("norm1", "norm2"):
        reason = _why_not_norm(getattr(block, name, None))
        if reason:
            return reason
    for name in ("conv1", "conv2"):
        if conv_of(getattr(block, name, None)) is None:
            return f"it has no 2-D convolution {name}"
    shortcut = _shortcut(block)
    if shortcut is not None and conv_of(shortcut) is None:
        return f"its shortcut is {type(shortcut).__name__}, want a 2-D convolution"
    if not isinstance(getattr(block, "dropout", None), nn.Dropout | nn.Identity | None):
        return f"its dropout is {type(block.dropout).__name__}, want Dropout or none"
    return why_not_owned(block)


def _shortcut(block: Any) -> Any:
    """The convolution beside a block's own two, or None."""
    found = next((own for name in SHORTCUTS if isinstance(own := getattr(block, name, None), nn.Module)), None)
    return None if isinstance(found, nn.Identity) else found


def _may_double(module: Any) -> bool:
    """Whether a module holds one 3 x 3 convolution `conv` and nothing else."""
    if not isinstance(module, nn.Module) or not is_enlarging(getattr(module, "conv", None)):
        return False
    return list(module._modules) == ["conv"] and not module._parameters and why_not_owned(module) is None


def _is_doubling(module: Any, times: int) -> bool:
    """Whether it convolves a picture of twice the sides, no more, tried with one as it is on the way from the small latent.

    By the bare convolution, since that is what `enlarged` works out: what a module around it does besides makes another picture.
    times: the latent's sides. What cuDNN plans for it, the check of the whole needs too.
    """
    if not _may_double(module):
        return False
    weight = conv_of(module.conv).weight  # type: ignore[union-attr]
    sides = (n * times for n in LATENT)
    x = torch.randn(1, weight.shape[1], *sides, generator=torch.Generator().manual_seed(0)).to(weight)
    x = x.to(multiplied_in(x), memory_format=torch.channels_last)
    try:
        own, ours = module(x), conv_of(module.conv)(F.interpolate(x, scale_factor=2, mode="nearest"))  # type: ignore[misc]
    except Exception:  # it takes something else than a picture
        return False
    return own.shape == ours.shape and bool((own - ours).float().norm() <= 0.01 * own.float().norm())


def _why_not_alike(got: Tensor, want: Tensor) -> str | None:
    """Why two decodings are not of one decoder, or None."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"its own code makes {tuple(want.shape)} {want.dtype} of a latent, the known order {tuple(got.shape)} {got.dtype}"
    if not bool(torch.isfinite(want).all()):
        return "its picture of a random latent is not finite, so that both ways cannot be compared"
    apart = float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-12))
    if not apart <= APART[want.dtype]:
        return f"its modules have the known names, but its own code makes another picture of them ({apart:.2g} apart)"
    return None


def _normed(module: Any, x: Tensor, silu: bool = True, add: Tensor | None = None) -> Tensor:
    """silu(norm(x + add)) in the dtype that a convolution casts it to."""
    norm = norm_of(module)
    assert norm is not None
    dtype = multiplied_in(x)
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous(memory_format=torch.channels_last)
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu, out_dtype=dtype, add=add)


class _Normed:
    """The norm of an attention block."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, inner: Any, x: Tensor) -> Any:
        wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *self.module.parameters()))
        known = x.ndim == 4 and x.dtype in FLOATS and x.device.type in ("cpu", "cuda")
        return _normed(self.module, x, silu=False) if known and not wants_grad else inner(x)


def _residual(block: Any, x: Tensor) -> Tensor:
    """A residual block."""
    h, bias = bare(block.conv1, _normed(block.norm1, x))
    h = _normed(block.norm2, h, add=bias)
    if getattr(block, "dropout", None) is not None:
        h = block.dropout(h)
    h, bias = bare(block.conv2, h)
    shortcut = _shortcut(block)
    x, x_bias = (x, None) if shortcut is None else bare(shortcut, x)
    if bias is None and x_bias is None:
        return x + h
    if why_not_biased_sum(*map(form, (x, h, x_bias, bias))) is not None:  # of two dtypes or memory formats
        return biased(x, x_bias) + biased(h, bias)
    return biased_sum(x, h, x_bias, bias)
