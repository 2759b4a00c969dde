"""Picture <-> the features that are quantised: emojivar's small convolutional autoencoder, eight pixels a token."""

from __future__ import annotations

from torch import Tensor, nn

from sparvar_tune.bitwise.tokenizer import FeatureEncoder, ResBlock


class Encoder(FeatureEncoder):
    """[B, 3, 8h, 8w] in -1..1 -> [B, bits, h, w], unit RMS over channels at each place. Only training uses it."""

    def __init__(self, bits: int) -> None:
        super().__init__(
            nn.PixelUnshuffle(2), nn.Conv2d(12, 48, 3, padding=1), ResBlock(48),
            nn.Conv2d(48, 96, 3, stride=2, padding=1), ResBlock(96), ResBlock(96),
            nn.Conv2d(96, 160, 3, stride=2, padding=1), ResBlock(160), ResBlock(160), ResBlock(160),
            nn.GroupNorm(8, 160), nn.SiLU(), nn.Conv2d(160, bits, 1),
        )  # fmt: skip


class Decoder(nn.Module):
    """[B, bits, h, w] -> [B, 3, 8h, 8w] in about -1..1."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(bits, 144, 3, padding=1), ResBlock(144), ResBlock(144),
            nn.Conv2d(144, 4 * 88, 1), nn.PixelShuffle(2), ResBlock(88), ResBlock(88),
            nn.Conv2d(88, 4 * 40, 1), nn.PixelShuffle(2), ResBlock(40), ResBlock(40),
            nn.Conv2d(40, 48, 3, padding=1), nn.SiLU(), nn.Conv2d(48, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip

    def forward(self, fhat: Tensor) -> Tensor:
        return self.net(fhat)
