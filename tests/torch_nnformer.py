"""A plain PyTorch nnFormer, written for the tests from the description of the authors' state dict.

It has their tensor names and nothing of their code. Volumes are (batch, 1, depth, height, width), features
(batch, depth, height, width, channels).
"""

import itertools

import torch
from torch import nn
from torch.nn import functional

LAYER_NORM_EPS = 1e-5


class WindowAttention(nn.Module):
    """Tokens (windows, tokens, channels); with `context` the queries are the tokens themselves."""

    def __init__(self, dim: int, heads: int, window: int, cross: bool):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 3, heads))
        self.register_buffer("relative_position_index", torch.zeros(window**3, window**3, dtype=torch.int64))
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
            images = len(logits) // len(mask)
            logits = logits + mask.repeat(images, 1, 1)[:, None]
        return self.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))


def windows_of(x, window):
    """(b, d, h, w, c) -> (b * windows, tokens, c)."""
    b, d, h, w, c = x.shape
    x = x.view(b, d // window, window, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, window**3, c)


def from_windows(x, window, shape):
    b, d, h, w, c = shape
    x = x.view(b, d // window, h // window, w // window, window, window, window, c)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(shape)


def shift_mask(grid, window, shift):
    """-100 between tokens that were not neighbours before the shift."""
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


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, window: int, shift: int, cross: bool = False):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.attn = WindowAttention(dim, heads, window, cross)
        self.norm2 = nn.LayerNorm(dim, LAYER_NORM_EPS)
        self.mlp = Mlp(dim)

    def attend(self, x, context=None):
        grid = x.shape[1:4]
        pads = [p for n in reversed(grid) for p in (0, -n % self.window)]

        def prepare(x):
            x = functional.pad(x, (0, 0, *pads))
            return torch.roll(x, (-self.shift,) * 3, (1, 2, 3))

        padded = prepare(x)
        mask = shift_mask(padded.shape[1:4], self.window, self.shift) if self.shift else None
        context = None if context is None else windows_of(prepare(context), self.window)
        y = self.attn(windows_of(padded, self.window), context, mask)
        y = torch.roll(from_windows(y, self.window, padded.shape), (self.shift,) * 3, (1, 2, 3))
        return y[:, : grid[0], : grid[1], : grid[2]]

    def forward(self, x, skip=None):
        attended = self.attend(self.norm1(x), None if skip is None else self.norm1(skip))
        x = attended + (x if skip is None else x + skip)
        return x + self.mlp(self.norm2(x))


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
    """An encoder stage (`up` false) or a decoder stage of `dim` channels on `grid`."""

    def __init__(self, dim: int, grid: tuple[int, ...], heads: int, window: int, depth: int, up: bool, last: bool):
        super().__init__()
        shift = 0 if min(grid) <= window else window // 2
        window = min(window, *grid)
        blocks = [Block(dim, heads, window, shift if j % 2 or (up and j) else 0, up and j == 0) for j in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        if up:
            self.Upsample = Upsample(2 * dim)
        elif not last:
            self.downsample = Downsample(dim)


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


class PatchEmbed(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.proj1 = Convolutions(1, dim // 2, 2, second_norm=True)
        self.proj2 = Convolutions(dim // 2, dim, 1, second_norm=False)
        self.norm = nn.LayerNorm(dim, LAYER_NORM_EPS)

    def forward(self, x):
        return self.norm(self.proj2(self.proj1(x)))


class Encoder(nn.Module):
    def __init__(self, crop, dim: int, heads, windows, depths):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(dim)
        grids = [tuple(n // 2 // 2**i for n in crop) for i in range(len(depths))]
        self.layers = nn.ModuleList(
            Stage(dim * 2**i, grids[i], heads[i], windows[i], depths[i], up=False, last=i == len(depths) - 1)
            for i in range(len(depths))
        )
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
    def __init__(self, crop, dim: int, heads, windows, depths):
        super().__init__()
        self.layers = nn.ModuleList(
            Stage(dim * 2**i, tuple(n // 2 // 2**i for n in crop), heads[i], windows[i], depths[i], up=True, last=False)
            for i in range(len(depths) - 1)
        )

    def forward(self, skips):
        """The stages' outputs, from coarse to fine."""
        x, outputs = skips[-1], []
        for stage, skip in zip(reversed(self.layers), reversed(skips[:-1]), strict=True):
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
    """Returns (cls, encoder tokens, decoder tokens, reconstruction), all but cls with space as (d, h, w)."""

    def __init__(self, crop=(64, 64, 64), width=48, heads=(6, 12, 24, 48), windows=(4, 4, 8, 4), depths=(2, 2, 2, 2)):
        super().__init__()
        self.model_down = Encoder(crop, width, heads, windows, depths)
        self.decoder = Decoder(crop, width, heads, windows, depths)
        self.final = nn.ModuleList(Expand(width * 2**i) for i in range(len(depths) - 1))

    def forward(self, volume, position=None):
        skips = self.model_down(volume, position)
        outputs = self.decoder(skips)
        reconstruction = self.final[0].up(outputs[-1].permute(0, 4, 1, 2, 3))
        return skips[-1].mean(dim=(1, 2, 3)), skips[-1], outputs[0], reconstruction
