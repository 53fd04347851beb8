"""A plain PyTorch nnFormer: what the tests compare our numbers with, and the benchmark our speed.

Written from the description of the authors' state dict: it has their tensor names and nothing of their code.
Volumes are (batch, 1, depth, height, width), features (batch, depth, height, width, channels).
"""

import itertools

import torch
from torch import nn
from torch.nn import functional

LAYER_NORM_EPS = 1e-5


def position_index(window: int):
    """The bias table's row for each pair (query, key) of a window's tokens: (tokens, tokens).

    The strides are the release's, with which some offsets share a row; loaded weights bring their own index.
    """
    place = torch.cartesian_prod(*[torch.arange(window)] * 3)
    offset = place[:, None] - place[None, :] + window - 1
    return (offset * torch.tensor([3 * window - 1, 2 * window - 1, 1])).sum(-1)


class WindowAttention(nn.Module):
    """Tokens (windows, tokens, channels); with `context` the queries are the tokens themselves."""

    def __init__(self, dim: int, heads: int, window: int, cross: bool):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 3, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", position_index(window))
        if cross:
            self.kv = nn.Linear(dim, 2 * dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x):
        """(n, tokens, c) -> (n, heads, tokens, c / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, context=None, mask=None):
        if context is None:
            query, key, value = (self.split(part) for part in self.qkv(x).chunk(3, dim=-1))
        else:
            query = self.split(x)
            key, value = (self.split(part) for part in self.kv(context).chunk(2, dim=-1))
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        logits = logits + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:  # (windows of one image, tokens, tokens)
            logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        return self.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))


def windows_of(x, window):
    """(b, d, h, w, c) -> (b * windows, tokens, c)."""
    b, d, h, w, c = x.shape
    x = x.view(b, d // window, window, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, window**3, c)


def from_windows(x, window, grid):
    """(b * windows, tokens, c) -> (b, d, h, w, c)."""
    d, h, w = (n // window for n in grid)
    x = x.view(-1, d, h, w, window, window, window, x.shape[-1])
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, *grid, x.shape[-1])


def shift_mask(grid, window, shift):
    """-100 between tokens that were not neighbours before the shift: (windows, tokens, tokens)."""
    region = torch.zeros(1, *grid, 1)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (d, h, w) in enumerate(itertools.product(cuts, repeat=3)):
        region[:, d, h, w] = number
    region = windows_of(region, window).squeeze(-1)
    return (region[:, :, None] != region[:, None, :]) * -100.0


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Drops a residual branch for whole samples and scales those kept by 1 / keep."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(len(x), *(1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """Features (batch, d, h, w, c) on `grid`; with `cross` the first attention looks at a skip of the same shape."""

    def __init__(
        self, dim: int, grid: tuple[int, ...], heads: int, window: int, shifted: bool, drop_path: float, cross: bool
    ):
        super().__init__()
        self.shift = window // 2 if shifted and min(grid) > window else 0
        self.window = window = min(window, *grid)
        self.grid, self.padded = grid, tuple(n + -n % window for n in grid)
        self.norm1 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.attn = WindowAttention(dim, heads, window, cross)
        self.norm2 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.mlp = Mlp(dim)
        self.drop_path = DropPath(drop_path)
        mask = shift_mask(self.padded, window, self.shift) if self.shift else None
        self.register_buffer("mask", mask, persistent=False)

    def to_windows(self, x):
        if self.padded != self.grid:
            pads = [p for n, m in zip(reversed(self.grid), reversed(self.padded), strict=True) for p in (0, m - n)]
            x = functional.pad(x, (0, 0, *pads))
        if self.shift:
            x = torch.roll(x, (-self.shift,) * 3, (1, 2, 3))
        return windows_of(x, self.window)

    def attend(self, x, context=None):
        context = None if context is None else self.to_windows(context)
        y = from_windows(self.attn(self.to_windows(x), context, self.mask), self.window, self.padded)
        if self.shift:
            y = torch.roll(y, (self.shift,) * 3, (1, 2, 3))
        return y[:, : self.grid[0], : self.grid[1], : self.grid[2]]

    def forward(self, x, skip=None):
        attended = self.attend(self.norm1(x), None if skip is None else self.norm1(skip))
        x = (x if skip is None else x + skip) + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def channels_last(convolution, x):
    return convolution(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


class Downsample(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Conv3d(dim, 2 * dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim, LAYER_NORM_EPS)

    def forward(self, x):
        return channels_last(self.reduction, self.norm(functional.gelu(x)))


class Upsample(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.up = nn.ConvTranspose3d(dim, dim // 2, 2, stride=2)

    def forward(self, x):
        return channels_last(self.up, self.norm(x))


class Stage(nn.Module):
    """An encoder stage (`up` false) or a decoder stage of `dim` channels on `grid`; one block for each drop rate."""

    def __init__(self, dim: int, grid: tuple[int, ...], heads: int, window: int, rates, up: bool, last: bool):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(dim, grid, heads, window, shifted=j > 0 if up else j % 2 == 1, drop_path=rate, cross=up and j == 0)
            for j, rate in enumerate(rates)
        )
        if up:
            self.Upsample = Upsample(2 * dim)
        elif not last:
            self.downsample = Downsample(dim)


def rates_of(drop_path: float, depths):
    """Drop rates from 0 to `drop_path` over all blocks in the order in which they run, stage by stage."""
    return torch.linspace(0, drop_path, sum(depths)).split(list(depths))


class Convolutions(nn.Module):
    def __init__(self, channels: int, dim: int, stride, second_norm: bool):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, dim, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv3d(dim, dim, 3, padding=1)
        self.norm1 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        if second_norm:
            self.norm2 = nn.LayerNorm(dim, LAYER_NORM_EPS)

    def forward(self, x):
        x = channels_last(self.conv2, self.norm1(functional.gelu(channels_last(self.conv1, x))))
        return self.norm2(functional.gelu(x)) if hasattr(self, "norm2") else x


def stages(crop, dim: int, heads, windows, rates, up: bool):
    """One for each tensor of drop rates, from the finest grid on."""
    return nn.ModuleList(
        Stage(
            dim * 2**i,
            tuple(n // 2 // 2**i for n in crop),
            heads[i],
            windows[i],
            each.tolist(),
            up=up,
            last=not up and i == len(rates) - 1,
        )
        for i, each in enumerate(rates)
    )


class PatchEmbed(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.proj1 = Convolutions(1, dim // 2, 2, second_norm=True)
        self.proj2 = Convolutions(dim // 2, dim, 1, second_norm=False)
        self.norm = nn.LayerNorm(dim, LAYER_NORM_EPS)

    def forward(self, x):
        return self.norm(self.proj2(self.proj1(x)))


class Encoder(nn.Module):
    def __init__(self, crop, dim: int, heads, windows, depths, drop_path: float):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(dim)
        self.layers = stages(crop, dim, heads, windows, rates_of(drop_path, depths), up=False)
        for i in range(len(depths)):
            self.add_module(f"norm{i}", nn.LayerNorm(dim * 2**i, LAYER_NORM_EPS))

    def forward(self, x, position):
        x = self.patch_embed(x.permute(0, 2, 3, 4, 1))
        x = x + position.view(1, *x.shape[1:]) if position is not None else x
        skips = []
        for i, stage in enumerate(self.layers):
            for block in stage.blocks:
                x = block(x)
            skips.append(getattr(self, f"norm{i}")(x))
            x = stage.downsample(x) if hasattr(stage, "downsample") else x
        return skips


class Decoder(nn.Module):
    def __init__(self, crop, dim: int, heads, windows, depths, drop_path: float):
        super().__init__()
        from_coarse = rates_of(drop_path, depths[-2::-1])
        self.layers = stages(crop, dim, heads, windows, from_coarse[::-1], up=True)

    def forward(self, skips, stages=None):
        """The outputs of the first `stages` stages (default: of all), from coarse to fine."""
        x, outputs = skips[-1], []
        for stage, skip in list(zip(reversed(self.layers), reversed(skips[:-1]), strict=True))[:stages]:
            x = stage.Upsample(x)
            for j, block in enumerate(stage.blocks):
                x = block(x, skip) if j == 0 else block(x)
            outputs.append(x)
        return outputs


class Expand(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.up = nn.ConvTranspose3d(dim, 1, 2, stride=2)


class NNFormer(nn.Module):
    """Returns (cls, encoder tokens, decoder tokens, reconstruction), all but cls with space as (d, h, w).

    Without `reconstruct` it stops at the decoder tokens, and the reconstruction is None.
    """

    def __init__(
        self,
        crop=(64, 64, 64),
        width=48,
        heads=(6, 12, 24, 48),
        windows=(4, 4, 8, 4),
        depths=(2, 2, 2, 2),
        drop_path=0.2,
    ):
        super().__init__()
        self.model_down = Encoder(crop, width, heads, windows, depths, drop_path)
        self.decoder = Decoder(crop, width, heads, windows, depths, drop_path)
        self.final = nn.ModuleList(Expand(width * 2**i) for i in range(len(depths) - 1))

    def forward(self, volume, position=None, reconstruct=True):
        skips = self.model_down(volume, position)
        outputs = self.decoder(skips, stages=None if reconstruct else 1)
        reconstruction = self.final[0].up(outputs[-1].permute(0, 4, 1, 2, 3)) if reconstruct else None
        return skips[-1].mean(dim=(1, 2, 3)), skips[-1], outputs[0], reconstruction
