"""Models to measure with."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (option A of the paper)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.more = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, 0, self.more)))


class ResNet20(nn.Module):
    """ResNet-20 for 32×32 images (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        sizes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2
        sizes += [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks = nn.Sequential(*(Block(*size) for size in sizes))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Causal self-attention and a perceptron, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        parts = self.attention(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(found.transpose(1, 2).flatten(2))
        return x + self.perceptron(self.norm2(x))  # type: ignore[no-any-return]


class GPT2(nn.Module):
    """A transformer of the size of the smallest GPT-2: 124 M parameters, the head tied."""

    def __init__(
        self, words: int = 50257, context: int = 1024, width: int = 768, depth: int = 12
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width, width // 64) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def features(self, tokens: Tensor) -> Tensor:
        """The outputs of the last layer, ``[B, T, width]``."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.norm(self.layers(self.words(tokens) + self.places(places)))  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        # The scores of the words come second, as every loss of classes has it.
        return F.linear(self.features(tokens), self.words.weight).transpose(1, 2)

    @staticmethod
    def products(tokens: int, words: int = 50257, width: int = 768, depth: int = 12) -> float:
        """Floating-point operations in the matrix products of a token: a multiply and an add."""
        return 2.0 * (depth * 12 * width**2 + words * width + depth * tokens * width)


class TokenScores(GPT2):
    """The same with the scores last and a head of its own class, which losscli may defer."""

    def __init__(
        self, words: int = 50257, context: int = 1024, width: int = 768, depth: int = 12
    ) -> None:
        super().__init__(words, context, width, depth)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens))  # type: ignore[no-any-return]
