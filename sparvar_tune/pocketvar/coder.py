"""Picture <-> the features that are quantised: pocketvar's small convolutional autoencoder."""

from __future__ import annotations

from torch import Tensor, nn

from sparvar_tune.bitwise.tokenizer import FeatureEncoder, ResBlock


class Encoder(FeatureEncoder):
    """[B, 3, 256, 256] in -1..1 -> [B, bits, 64, 64], unit RMS over channels at each place. Only training uses it."""

    def __init__(self, bits: int) -> None:
        super().__init__(
            nn.Conv2d(3, 24, 3, padding=1), nn.SiLU(), nn.PixelUnshuffle(2),
            nn.Conv2d(96, 64, 3, padding=1), ResBlock(64), ResBlock(64),
            nn.Conv2d(64, 128, 3, stride=2, padding=1), ResBlock(128), ResBlock(128), ResBlock(128),
            nn.GroupNorm(8, 128), nn.SiLU(), nn.Conv2d(128, bits, 1),
        )  # fmt: skip


class Decoder(nn.Module):
    """[B, bits, 64, 64] -> [B, 3, 256, 256] in about -1..1."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(bits, 128, 3, padding=1), ResBlock(128), ResBlock(128), ResBlock(128),
            nn.Conv2d(128, 256, 1), nn.PixelShuffle(2),
            nn.Conv2d(64, 64, 3, padding=1), ResBlock(64), ResBlock(64),
            nn.Conv2d(64, 96, 3, padding=1), nn.PixelShuffle(2), nn.SiLU(), nn.Conv2d(24, 3, 3, padding=1),
        )  # fmt: skip

    def forward(self, fhat: Tensor) -> Tensor:
        return self.net(fhat)
