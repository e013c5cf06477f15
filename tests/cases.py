"""The cases that every law is asserted over: built-in models and foreign ones, with data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from losscli.evaluation.losses import built_in as losses
from losscli.models import CNN, MLP
from tests import foreign


def sample(values: Iterable[Any], start: int, share: int = 3) -> list[Any]:
    """Parameters of a test: ``make test`` takes each ``share``-th, ``make stress`` the others.

    Tests of the same list start at different places, so that together they take all of it.
    """
    return [value if k % share == start else _stressed(value) for k, value in enumerate(values)]


def in_turn(values: Iterable[Any], *variants: Any) -> list[Any]:
    """Parameters of a test of each value in each variant: ``make test`` takes one per value."""
    return sample(
        (
            tuple(x for part in (value, variant) for x in _parts(part))
            for k, value in enumerate(values)
            for variant in variants[k % len(variants) :] + variants[: k % len(variants)]
        ),
        0,
        len(variants),
    )


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _stressed(value: Any) -> Any:
    """The parameter of a test for ``make stress``."""
    if hasattr(value, "marks"):  # it is one of pytest already
        return pytest.param(*value.values, id=value.id, marks=[*value.marks, pytest.mark.stress])
    return pytest.param(*_parts(value), marks=pytest.mark.stress)


@dataclass(frozen=True, eq=False)
class Case:
    """A case; it is hashed by identity, so that what is computed for it can be cached."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Any
    targets: Tensor
    loss: str = "cross_entropy"

    def __str__(self) -> str:
        return self.name

    def state(self, seed: int) -> dict[str, Tensor]:
        """A point in weight space, with BatchNorm statistics that are not the initial ones."""
        torch.manual_seed(seed)
        model = self.build()
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @property
    def per_example(self) -> Callable[[Tensor, Tensor], Tensor]:
        return losses.LOSSES[self.loss]


_generator = torch.Generator().manual_seed(0)


def _uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=_generator) - 0.5


def _whole(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=_generator)


def _bytes(*shape: int) -> Tensor:
    # From a generator of its own: the other cases keep their numbers.
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)


_N = 37

CASES = [
    Case("mlp-relu", lambda: MLP("12-9-5"), _uniform(_N, 3, 4), _whole(5, _N)),
    Case(
        "mlp-sigmoid",
        lambda: MLP("12-9-9-5", activation="sigmoid"),
        _whole(256, _N, 12) / 255,
        _whole(5, _N),
    ),
    Case(
        "mlp-tanh-bce",
        lambda: MLP("6-8-1", activation="tanh"),
        _uniform(_N, 6),
        _whole(2, _N),
        "bce",
    ),
    Case(
        "mlp-maxout",
        lambda: MLP("12-9-5", activation="maxout", pieces=3),
        _uniform(_N, 12),
        _whole(5, _N),
    ),
    Case("mlp-linear-mse", lambda: MLP("4-2"), _uniform(_N, 4), _uniform(_N, 2), "mse"),
    Case("cnn", lambda: CNN("4-6", channels=2, classes=3), _uniform(_N, 2, 6, 6), _whole(3, _N)),
    Case(
        "cnn-batchnorm",
        lambda: CNN("4-6", channels=2, classes=3, batchnorm=True),
        _whole(256, _N, 2, 6, 6) / 255,
        _whole(3, _N),
    ),
    Case("lstm", foreign.Recurrent, _uniform(_N, 5, 4), _whole(3, _N)),
    Case("attention-tied", foreign.Attention, _whole(11, _N, 5), _whole(11, _N)),
    Case("branching", foreign.Branching, _uniform(_N, 5), _whole(3, _N)),
    Case("normalising", foreign.Normalising, _uniform(_N, 6), _whole(3, _N)),
    Case("convolving", foreign.Convolving, _uniform(_N, 2, 7, 7), _whole(3, _N)),
    Case(
        "two-inputs",
        foreign.TwoInputs,
        {"words": _whole(9, _N, 4), "sizes": _uniform(_N, 3)},
        _whole(2, _N),
    ),
    Case("dividing", foreign.Dividing, _bytes(_N, 2, 7, 7), torch.arange(_N) % 3),
    Case("spoiling", foreign.Spoiling, _uniform(_N, 4), _whole(3, _N)),
    Case("functional", foreign.Functional, _uniform(_N, 4), _whole(3, _N)),
    *(
        Case(model.__name__.lower(), model, _uniform(_N, 4), _whole(3, _N))
        for model in (
            foreign.Closure,
            foreign.Patched,
            foreign.Hooked,
            foreign.LowRank,
            foreign.Threaded,
            foreign.Folding,
            foreign.Locked,
            foreign.Functorch,
            foreign.Differentiating,
        )
    ),
]
