"""Release mode's student, teacher and CASA in plain PyTorch, with the authors' tensor names and none of their code."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch_nnformer import NNFormer


class Prototypes(nn.Module):
    """Weight normalisation with a gain that is not trained: (..., bottleneck) -> (..., prototypes)."""

    def __init__(self, bottleneck: int, prototypes: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, x):
        return functional.linear(x, self.weight_g * functional.normalize(self.weight_v, dim=-1))


class Head(nn.Module):
    """Prototype logits of cls (b, width), encoder tokens (b, n, width) and decoder tokens (b, m, width / 2)."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int, separate_last: bool):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last_layer = Prototypes(bottleneck, prototypes)
        self.last_layer2 = Prototypes(bottleneck, prototypes) if separate_last else self.last_layer
        self.mlp3 = nn.Linear(width, width)
        self.mlp4 = nn.Linear(width // 2, width)

    def features(self, x):
        return functional.normalize(self.mlp(x), dim=-1)

    def cls(self, x):
        return self.last_layer(self.features(x))

    def encoder(self, tokens):
        return self.last_layer2(self.features(self.mlp3(tokens)))

    def decoder(self, tokens):
        return self.last_layer2(self.features(self.mlp4(tokens)))


class CrossAttention(nn.Module):
    """Multi-head attention of query (b, q, width) to context (b, k, width), residual, LayerNorm -> (b, q, width)."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.w_qs = nn.Linear(width, width, bias=False)
        self.w_ks = nn.Linear(width, width, bias=False)
        self.w_vs = nn.Linear(width, width, bias=False)
        self.fc = nn.Linear(width, width, bias=False)
        self.layer_norm = nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def split(self, x):
        """(b, n, c) -> (b, heads, n, c / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, query, context):
        q, k, v = self.split(self.w_qs(query)), self.split(self.w_ks(context)), self.split(self.w_vs(context))
        weights = self.dropout((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1))
        attended = self.fc((weights @ v).transpose(1, 2).flatten(2))
        return self.layer_norm(self.dropout(attended) + query)


class FeedForward(nn.Module):
    """ReLU feed-forward with residual and LayerNorm: (b, n, width) -> (b, n, width)."""

    def __init__(self, width: int, inner: int, dropout: float):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.layer_norm = nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.layer_norm(x + self.dropout(self.w_2(functional.relu(self.w_1(x)))))


class CASA(nn.Module):
    """query (b, q, width), context (b, k, width) -> (b, q, width), without the projections that are never used."""

    def __init__(self, width: int, inner: int, heads: int, dropout: float):
        super().__init__()
        self.MH_attn = CrossAttention(width, heads, dropout)
        self.pos_ffn = FeedForward(width, inner, dropout)

    def forward(self, query, context):
        return self.pos_ffn(self.MH_attn(query, context))


class Network(nn.Module):
    def __init__(self, backbone: NNFormer, head: Head):
        super().__init__()
        self.backbone, self.head = backbone, head


class Outputs(NamedTuple):
    """What the losses need of both views of each pair."""

    student_cls: torch.Tensor  # (pairs, 2, prototypes)
    teacher_cls: torch.Tensor  # (pairs, 2, prototypes)
    aligned: torch.Tensor  # (pairs, 2, tokens, prototypes)
    aligned_target: torch.Tensor  # (pairs, 2, tokens, prototypes)
    reconstruction: torch.Tensor  # (pairs, 2, 1, depth, height, width)


class Twin(nn.Module):
    """Student, teacher and CASA, with the centers of the teacher's logits and the fixed position embeddings."""

    def __init__(
        self,
        width=48,
        crop=64,
        heads=(6, 12, 24, 48),
        windows=(4, 4, 8, 4),
        depths=(2, 2, 2, 2),
        head_hidden=2048,
        bottleneck=256,
        prototypes=512,
        casa_inner=2048,
        casa_heads=8,
        drop_path=0.2,
        dropout=0.1,
    ):
        super().__init__()

        def network(separate_last: bool) -> Network:
            backbone = NNFormer((crop,) * 3, width, heads, windows, depths, drop_path)
            top = width * 2 ** (len(depths) - 1)
            return Network(backbone, Head(top, head_hidden, bottleneck, prototypes, separate_last))

        self.student, self.teacher = network(separate_last=True), network(separate_last=False)
        # Both last layers of the student go into the teacher's only one; the second stays.
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.casa = CASA(prototypes, casa_inner, casa_heads, dropout)
        grid = (crop // 2,) * 3
        self.register_buffer("student_position", 0.02 * torch.randn(1, *grid, width))
        self.register_buffer("teacher_position", 0.02 * torch.randn(1, *grid, width))
        self.register_buffer("center_cls", torch.zeros(prototypes))
        self.register_buffer("center_tokens", torch.zeros(prototypes))

    def forward(self, volumes, hidden) -> Outputs:
        """volumes (pairs, 2, 1, d, h, w); hidden (pairs, 2, cells, cells, cells) bool, of which the first pair's count.

        In training mode the teacher is as noisy as the student.
        """
        pairs = len(volumes)
        hidden = hidden[:1].expand_as(hidden).flatten(0, 1)
        volumes = volumes.flatten(0, 1)
        visible = 1.0 - functional.interpolate(hidden[:, None].float(), size=volumes.shape[-3:], mode="nearest")

        head = self.student.head
        features, tokens, fine_tokens, reconstruction = self.student.backbone(volumes * visible, self.student_position)
        student_cls, query = head.cls(features), head.encoder(tokens.flatten(1, 3))
        aligned = self.casa(query, head.decoder(fine_tokens.flatten(1, 3)))

        with torch.no_grad():
            head = self.teacher.head
            features, _, fine_tokens, _ = self.teacher.backbone(volumes, self.teacher_position, reconstruct=False)
            teacher_cls = head.cls(features)
            aligned_target = self.casa(query, head.decoder(fine_tokens.flatten(1, 3)))

        arrays = (student_cls, teacher_cls, aligned, aligned_target, reconstruction)
        return Outputs(*(x.unflatten(0, (pairs, 2)) for x in arrays))
