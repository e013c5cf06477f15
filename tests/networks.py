"""Networks with hidden units in every place where they may be permuted, counted by hand."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._export.utils
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from losscli.models import CNN, MLP
from losscli.weight_space.permutations import Group, hidden_units
from losscli.weight_space.tracing import trace
from tests import foreign

# Each trace lists all operators of PyTorch for each of their namespaces, and twice: a quarter of
# its time.
torch._export.utils._materialize_cpp_cia_ops = functools.cache(
    torch._export.utils._materialize_cpp_cia_ops
)


class _Annotation(type):
    def __getitem__(cls, _: object) -> type:
        return cls

    def __instancecheck__(cls, value: object) -> bool:
        return callable(value)


# It also makes the annotations of a function in PyTorch again, for thousands of operators.
torch._ops.Callable = _Annotation("Callable", (), {})


@dataclass(frozen=True)
class Network:
    """A network, a small batch for it, and the sizes of its groups as one counts them."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Tensor
    sizes: list[int]

    def __str__(self) -> str:
        return self.name

    def model(self, seed: int = 0) -> nn.Module:
        """In float64, with no weight or statistic at a special value."""
        torch.manual_seed(seed)
        model = self.build().double().eval()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name.endswith("running_var"):
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
                elif tensor.is_floating_point() and tensor.isfinite().all():
                    tensor.add_(torch.randn_like(tensor) * 0.3)
        return model

    @functools.cached_property
    def x(self) -> Tensor:
        return self.inputs.double() if self.inputs.is_floating_point() else self.inputs

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        return hidden_units(trace(self.model(), (self.x[:2],))).groups


class Block(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution where the stream changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.one = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm_one = nn.BatchNorm2d(after)
        self.two = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm_two = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if before != after:
            self.shortcut.append(nn.Conv2d(before, after, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm_one(self.one(x)), inplace=True)
        y = self.norm_two(self.two(y))
        y += self.shortcut(x)
        return F.relu(y)


class ResNet(nn.Module):
    """As for CIFAR: a stem, blocks of growing width, global average pooling."""

    def __init__(self, widths: tuple[int, ...] = (4, 6), blocks: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.blocks = nn.Sequential()
        before = widths[0]
        for width in widths:
            for _ in range(blocks):
                self.blocks.append(Block(before, width))
                before = width
        self.head = nn.Linear(before, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Padded(nn.Module):
    """A shortcut without weights: every second pixel, and channels of zeros on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return self.head((self.second(x) + shortcut).mean((2, 3)))


class Dense(nn.Module):
    """Concatenated channels, normalised together, flattened with their pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(9)
        self.hidden = nn.Linear(9 * 16, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        x = torch.cat([x, F.relu(self.second(x))], 1)
        x = F.max_pool2d(self.norm(x), 2)
        return self.head(torch.tanh(self.hidden(x.flatten(1))))


class Grouped(nn.Module):
    """A depthwise convolution; group norm; a grouped convolution; instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.group_norm = nn.GroupNorm(4, 8)
        self.mix = nn.Conv2d(8, 9, 1)
        self.grouped = nn.Conv2d(9, 15, 3, groups=3)
        self.instance_norm = nn.InstanceNorm2d(15, affine=True)
        self.slope = nn.PReLU(15)
        self.head = nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.group_norm(self.depthwise(self.first(x))))
        x = self.slope(self.instance_norm(self.grouped(F.hardswish(self.mix(x)))))
        return self.head(x.mean((-1, -2)))


class Views(nn.Module):
    """Code of a user's own: views, a residual layer norm, chunks as a gate, stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.inside = nn.Linear(8, 8)
        self.spread = nn.Linear(8, 12, bias=False)
        self.gate = nn.Linear(12, 10)
        self.narrow = nn.Linear(5, 6)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x.view(len(x), -1)))
        x = x + F.dropout(self.inside(self.norm(x)), 0.1, self.training)
        x = self.spread(x).reshape(-1, 3, 4).transpose(1, 2).reshape(-1, 12)
        u, v = self.gate(x).chunk(2, 1)
        x = self.narrow(u * torch.sigmoid(v))
        return self.head(torch.stack([x, x.abs()], 1).flatten(1))


class Tied(nn.Module):
    """One layer used twice, and one weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.middle = nn.Linear(5, 5)
        self.again = self.middle
        self.twin = nn.Linear(6, 5)
        self.twin.weight = self.first.weight
        self.head = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        h = h + torch.relu(self.middle(h))
        return self.head(h + torch.relu(self.again(h)) + self.twin(x))


class GPT(nn.Module):
    """Tokens, positions, causal attention by its own operator, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.norm_two = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        n, length, width = x.shape
        q, k, v = (
            z.view(n, length, 2, 4).transpose(1, 2) for z in self.qkv(self.norm(x)).split(8, 2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, length, width))
        return self.head(x + self.down(F.gelu(self.up(self.norm_two(x)))))[:, -1]


class Shared(nn.Module):
    """Four heads of queries to two of keys and values; RMS norm; types named on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 10)
        self.norm = nn.RMSNorm(10)
        self.q, self.k, self.v = (nn.Linear(10, n, bias=False) for n in (12, 6, 14))
        self.out = nn.Linear(28, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        y = self.norm(x.to(torch.float64)).to(x.dtype)
        q, k, v = (
            layer(y).unflatten(2, (heads, -1)).transpose(1, 2)
            for layer, heads in ((self.q, 4), (self.k, 2), (self.v, 2))
        )
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.head((x + self.out(y.transpose(1, 2).flatten(2))).mean(1))


class UNet(nn.Module):
    """Up and down: a transposed convolution, resizing, a skip, reparametrised weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.resize = nn.Upsample(scale_factor=2, mode="bilinear")
        self.beside = nn.Conv2d(6, 5, 1)
        self.c = nn.Conv2d(9, 7, 3, padding=1, padding_mode="reflect")
        self.d = nn.utils.parametrizations.weight_norm(nn.Conv2d(7, 8, 1))
        self.e = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 3, 1))
        self.out = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.relu(self.b(a))
        u = self.up(b) + self.beside(self.resize(b))
        c = F.elu(self.c(torch.cat([u, a], 1)))
        return self.out(self.e(F.mish(self.d(c))))


class Recurrent(nn.Module):
    """Two layers that keep a state from one step to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class Ordered(nn.Module):
    """The order of one hidden layer matters, that of the other does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(torch.relu(self.first(x)))
        return self.head(h.cumsum(1)) + h.argmax(1, keepdim=True)


class Unknown(nn.Module):
    """An operator that nothing is known of, after one hidden layer and before another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.linalg.matrix_exp(torch.diag_embed(self.first(x))).sum(2)
        return self.head(torch.relu(self.second(h)))


class Unused(nn.Module):
    """A layer that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)
        self.spare = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)))


_generator = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator)


_IMAGES = _normal(7, 3, 8, 8)
_TOKENS = torch.randint(11, (7, 5), generator=_generator)

NETWORKS = [
    Network("mlp", lambda: MLP("12-9-7-5", activation="tanh"), _normal(7, 3, 4), [7, 9]),
    # The units, and their pieces: those swapped alike in all units.
    Network("maxout", lambda: MLP("6-8-5", activation="maxout", pieces=3), _normal(7, 6), [3, 8]),
    Network("no-hidden", lambda: MLP("4-2"), _normal(7, 4), []),
    Network("cnn", lambda: CNN("4-6", channels=3, batchnorm=True), _IMAGES, [4, 6]),
    # Two streams, and what is inside of each block.
    Network("resnet", ResNet, _IMAGES, [4, 4, 6, 6]),
    # Those of the stream, and those that meet zeros only.
    Network("padded", Padded, _IMAGES, [2, 2, 4]),
    Network("dense", Dense, _IMAGES, [4, 5, 7]),
    # Pairs within 4 groups that are normalised together; 3 groups of 3 inputs and 5 outputs.
    Network("grouped", Grouped, _IMAGES, [2, 3, 3, 4, 5]),
    # The stream; rows and columns that are transposed; the gate; what is stacked.
    Network("views", Views, _normal(7, 3, 4), [3, 4, 5, 6, 8]),
    Network("tied", Tied, _normal(7, 6), [5]),
    # The stream; 2 heads; in all heads alike the 4 of queries and keys, and the 4 of values.
    Network("gpt", GPT, _TOKENS, [2, 4, 4, 8, 16]),
    # The stream; 2 heads of keys and values; 2 of queries to each; inside queries, and values.
    Network("shared", Shared, _TOKENS, [2, 2, 3, 7, 10]),
    # As gpt, but queries, keys and values are one tensor, cut along an axis of its own.
    Network("attention", foreign.Attention, _TOKENS, [2, 4, 8, 16]),
    Network("unet", UNet, _IMAGES, [3, 4, 5, 6, 7, 8]),
    # Both layers start from one tensor of zeros, which ties them.
    Network("gru", Recurrent, _normal(7, 5, 4), [5]),
    Network("ordered", Ordered, _normal(7, 6), [8]),
    Network("unknown", Unknown, _normal(7, 6), [4]),
    Network("unused", Unused, _normal(7, 6), [5]),
]


class Random(nn.Module):
    """A random program of layers, views, cuts and sums, drawn by a seed."""

    def __init__(self, seed: int, steps: int = 9) -> None:
        super().__init__()
        self.seed, self.steps = seed, steps
        self.layers = nn.ModuleList()
        with torch.no_grad():
            self.forward(torch.zeros(2, 12))

    def forward(self, x: Tensor) -> Tensor:
        choose = random.Random(self.seed)
        self.at = 0
        x = self.layer(lambda: nn.Linear(12, 12), x)
        for _ in range(self.steps):
            x = self.step(choose, x)
        x = x.flatten(1)
        return self.layer(lambda: nn.Linear(x.shape[1], 3), x)

    def layer(self, make: Callable[[], nn.Module], *x: Tensor) -> Tensor:
        if self.at == len(self.layers):
            self.layers.append(make())
        self.at += 1
        return self.layers[self.at - 1](*x)

    def step(self, choose: random.Random, x: Tensor) -> Tensor:
        kind = choose.choice([
            "linear", "linear", "residual", "relu", "swap", "flatten", "split", "cat", "gate",
            "reduce", "norm", "softmax", "slice", "scale", "pad", "square", "conv", "flip",
            "repeat",
        ])  # fmt: skip
        last, dim = x.shape[-1], choose.randrange(1, x.ndim)
        size = x.shape[dim]
        divisors = [n for n in range(2, size) if size % n == 0]
        n = choose.choice(divisors or [1])
        wide = choose.choice([4, 6, 12])
        if kind == "linear":
            return self.layer(lambda: nn.Linear(last, wide, bias=wide > 4), x)
        if kind == "residual":
            return x + torch.tanh(self.layer(lambda: nn.Linear(last, last), x))
        if kind == "norm":
            return self.layer(lambda: nn.LayerNorm(last), x)
        if kind == "scale":
            return x * self.layer(lambda: Scale(x.shape[1:]))
        if kind == "conv" and x.ndim == 3:
            groups = choose.choice([g for g in (1, 2, 3) if x.shape[1] % g == 0])
            return self.layer(lambda: nn.Conv1d(x.shape[1], 6, 3, padding=1, groups=groups), x)
        if kind == "swap" and x.ndim > 2:
            return x.transpose(1, 2)
        if kind == "flatten" and x.ndim > 2:
            return x.flatten(1, 2)
        if kind == "split" and divisors and x.ndim < 5:
            return x.unflatten(dim, (n, size // n))
        if kind == "cat" and x[0].numel() < 150:
            return torch.cat([x, x.abs()], dim)
        if kind == "gate" and size % 2 == 0:
            u, v = x.chunk(2, dim)
            return torch.sigmoid(u) * v
        if kind == "reduce" and x.ndim > 2:
            return choose.choice([x.amax, x.sum, x.mean])(dim)
        if kind == "slice" and size > 2:
            return x.narrow(dim, 1, size - 2)
        if kind == "pad":
            return F.pad(x, (0, 2))
        if kind == "square" and x.ndim == 3:
            return torch.softmax(x @ x.transpose(1, 2), -1) @ x
        if kind == "flip" and choose.random() < 0.2:
            return x.flip(dim)
        if kind == "repeat" and x[0].numel() < 80:
            return x.repeat(1, *[2 if i == dim else 1 for i in range(1, x.ndim)])
        return torch.softmax(x, dim) if kind == "softmax" else torch.relu(x)


class Scale(nn.Module):
    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape))

    def forward(self) -> Tensor:
        return self.scale
