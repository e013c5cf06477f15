"""Models as users write them: any control flow, any inputs, nothing of losscli's own."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0].mean(1))


class Attention(nn.Module):
    """Tokens in; a causal mask with infinities as a buffer; the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layer(self.embedding(tokens), src_mask=self.mask)
        return self.head(x[:, -1])


class Branching(nn.Module):
    """Which layer comes first depends on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 7)
        self.other = nn.Linear(5, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0] > 0:
            one = self.one(x)
            other = self.other(x)
        else:
            other = self.other(x)
            one = self.one(x)
        return self.head(torch.tanh(one) + torch.sigmoid(other))


class Normalising(nn.Module):
    """BatchNorm on its very inputs, dropout, then a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.shared = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.norm(x))
        return self.head(self.drop(torch.relu(self.shared(x))))


class Dividing(nn.Module):
    """Takes bytes, and scales them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.uint8:
            raise TypeError(f"bytes, not {x.dtype}")
        x = x.to(self.head.weight.dtype) / 255
        return self.head(torch.relu(self.norm(self.first(x))).flatten(1))


class Convolving(nn.Module):
    """A convolution with a stride, in-place activation, BatchNorm, a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        x = x + self.second(self.norm(x))
        return self.head(x.mean((2, 3)))


class TwoInputs(nn.Module):
    """Takes its inputs by name, one of them whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.sizes = nn.Linear(3, 4, bias=False)
        self.head = nn.Linear(4, 2)

    def forward(self, *, words: Tensor, sizes: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(words).sum(1) + self.sizes(sizes)))


class Spoiling(nn.Module):
    """Writes on its inputs, as careless code does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).mul_(2)
        return self.layer(x)


class Functional(nn.Module):
    """No layers at all: parameters and operators, the input scaled by one of them first."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale) @ self.weight + self.bias


class Random(nn.Module):
    """Random even in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5, training=True)


def linear(features: int = 3) -> nn.Module:
    return nn.Linear(features, 1)


def not_a_module() -> int:
    return 3


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] - targets) ** 2


def batch_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def hits(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float()


# No bool, where torchmetrics has one.
hits.higher_is_better = "no"  # type: ignore[attr-defined]


def data_as_mapping() -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(23, 4, generator=generator)
    return {"all": (x, torch.arange(23) % 3)}


def data_as_dicts() -> torch.utils.data.DataLoader[dict[str, Tensor]]:
    x, y = data_as_mapping()["all"]
    rows = [{"image": x[i], "label": y[i]} for i in range(len(y))]
    return torch.utils.data.DataLoader(rows, batch_size=5)  # type: ignore[arg-type]


def data_as_dataset() -> torch.utils.data.Dataset[tuple[Tensor, ...]]:
    return torch.utils.data.TensorDataset(*data_as_mapping()["all"])


def data_that_fails() -> None:
    raise RuntimeError("no disk\nno data")


def data_not_understood() -> list[int]:
    return [1, 2, 3]


class Closure(nn.Module):
    """Keeps a closure over itself, which copying does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.activation = lambda x: torch.tanh(x * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layer(x))


class Patched(nn.Sequential):
    """Known layers, with a forward that was wrapped as accelerators do."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        forward = self.forward
        self.forward = lambda x: forward(x) * 2  # type: ignore[method-assign]


FEATURES: dict[str, Tensor] = {}


class Hooked(nn.Module):
    """Takes its features from a table that a hook fills."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
        self.head = nn.Linear(5, 3)
        self.body.register_forward_hook(lambda *a: FEATURES.update(body=a[2]))

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return self.head(FEATURES["body"])


class LowRank(nn.Module):
    """A weight that is itself the product of two: bilinear, not affine."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, 4))
        self.b = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.linear(self.b, self.a.T))


class Compiled(nn.Module):
    """A body that no watcher sees into, below an ordinary head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.ReLU()))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Threaded(nn.Module):
    """Runs its first layer in a thread of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(self.body(x).detach()))
        thread.start()
        thread.join()
        return self.head(found[0])


class Folding(nn.Module):
    """Folds a low-rank part into its weight when it is put into eval mode, as LoRA layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.a = nn.Parameter(torch.randn(2, 4))
        self.b = nn.Parameter(torch.randn(3, 2))
        self.folded: Tensor | None = None

    def train(self, mode: bool = True) -> Folding:
        super().train(mode)
        self.folded = None if mode else (self.weight + self.b @ self.a).detach()
        return self

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.b @ self.a if self.folded is None else self.folded
        return x @ weight.T


class Locked(nn.Module):
    """Holds a lock while it computes."""

    lock = threading.Lock()

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert self.lock.acquire(timeout=20)
        outputs = self.layer(x)
        self.lock.release()
        return outputs


class Functorch(nn.Module):
    """Maps over its examples with vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.layer)(x)


class Differentiating(nn.Module):
    """Needs a gradient in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            outputs = self.layer(x)
            (gradient,) = torch.autograd.grad(outputs.square().sum(), self.layer.bias)
        return outputs.detach() + gradient.detach() / len(x) * 0


class Remembering(nn.Module):
    """Keeps what it computed from its first weights, for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.layer.weight.detach().clone()
        return F.linear(x, self.kept, self.layer.bias)
