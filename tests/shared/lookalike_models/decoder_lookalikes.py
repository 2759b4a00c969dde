"""Picture decoders as the public models have them: the same modules and names, plain or held within others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class HeldConv(nn.Module):
    """A convolution within a module, as Infinity has it."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.cnn_type, self.conv = "2d", nn.Conv2d(*args, **kwargs)

    def forward(self, x):
        return self.conv(x)


class HeldNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm_axis, self.norm = "spatial", nn.GroupNorm(4, channels, eps=1e-6)

    def forward(self, x):
        return self.norm(x)


class Plain:
    conv, activation = nn.Conv2d, staticmethod(F.silu)

    @staticmethod
    def norm(channels):
        return nn.GroupNorm(4, channels, eps=1e-6)


class Held(Plain):
    conv, norm = HeldConv, HeldNorm


class Rectified(Plain):
    """The known names around another function."""

    activation = staticmethod(F.relu)


class Residual(nn.Module):
    def __init__(self, kind, inside, outside, shortcut):
        super().__init__()
        self.norm1, self.conv1 = kind.norm(inside), kind.conv(inside, outside, 3, padding=1)
        self.norm2, self.conv2 = kind.norm(outside), kind.conv(outside, outside, 3, padding=1)
        self.dropout, self.activation = nn.Dropout(0.1), kind.activation
        if inside != outside:
            setattr(self, shortcut, kind.conv(inside, outside, 1))

    def forward(self, x):
        h = self.conv1(self.activation(self.norm1(x)))
        h = self.conv2(self.dropout(self.activation(self.norm2(h))))
        beside = next((m for name, m in self.named_children() if name.endswith("shortcut")), nn.Identity())
        return beside(x) + h


class Attention(nn.Module):
    """One head over all places."""

    def __init__(self, kind, channels):
        super().__init__()
        self.norm, self.proj_out = kind.norm(channels), kind.conv(channels, channels, 1)
        if kind is Held:
            self.q, self.k, self.v = (kind.conv(channels, channels, 1) for _ in range(3))
        else:
            self.qkv = kind.conv(channels, 3 * channels, 1)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = self.qkv(y).chunk(3, 1) if hasattr(self, "qkv") else (self.q(y), self.k(y), self.v(y))
        q, k, v = (t.flatten(2).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


class Up(nn.Module):
    def __init__(self, kind, channels):
        super().__init__()
        self.conv = kind.conv(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Decoder(nn.Module):
    """Two levels; attention in the middle and on the lower one."""

    def __init__(self, kind=Plain, shortcut="nin_shortcut", attention=True):
        super().__init__()
        self.activation = kind.activation
        self.conv_in = kind.conv(4, 16, 3, padding=1)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = (Residual(kind, 16, 16, shortcut) for _ in range(2))
        self.mid.attn_1 = Attention(kind, 16) if attention else nn.Identity()
        self.up = nn.ModuleList(nn.Module() for _ in range(2))
        for i, level in enumerate(self.up):
            width = 8 * (i + 1)
            level.block = nn.ModuleList(Residual(kind, 16 if j == 0 else width, width, shortcut) for j in range(2))
            level.attn = nn.ModuleList(Attention(kind, width) for _ in range(2) if i == 1 and attention)
        self.up[1].upsample = Up(kind, 16)
        self.norm_out, self.conv_out = kind.norm(8), kind.conv(8, 3, 3, padding=1)

    def forward(self, z):
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(self.conv_in(z))))
        for i in (1, 0):
            for j in range(2):
                h = self.up[i].block[j](h)
                if len(self.up[i].attn):
                    h = self.up[i].attn[j](h)
            if i == 1:
                h = self.up[i].upsample(h)
        return self.conv_out(self.activation(self.norm_out(h)))


def made(*args, **kwargs):
    torch.manual_seed(0)
    decoder = Decoder(*args, **kwargs).eval().requires_grad_(False)
    for module in decoder.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.add_(torch.randn_like(module.weight) * 0.3)
            module.bias.add_(torch.randn_like(module.bias) * 0.3)
    return decoder
