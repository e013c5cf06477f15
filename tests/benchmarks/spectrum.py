"""Both ends of the spectrum of a Hessian, with losscli and with what users could write or pick."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from losscli.data import DataSet, Split
from losscli.evaluation.hessian.curvature import Curvature
from losscli.evaluation.losses.built_in import cross_entropy
from losscli.evaluation.objective import Objective
from losscli.models import MLP

SPEC = "784-128-128-10"
EXAMPLES = 4000

# That of ``losscli check``.
_TOLERANCE = 1e-4

Product = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Point:
    """A trained network and its data."""

    weights: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor

    @property
    def model(self) -> MLP:
        """A model with the weights."""
        model = MLP(SPEC).to(self.inputs.device)
        model.load_state_dict(self.weights)
        return model


@dataclass(frozen=True)
class Ends:
    """The eigenvalues that were found, and the Hessian-vector products that they took."""

    smallest: float
    largest: float
    products: int


def train(device: torch.device) -> Point:
    """Trains a network on noisy copies of ten prototypes."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, 784, generator=generator)
    targets = torch.randint(10, (EXAMPLES,), generator=generator)
    noise = torch.randn(EXAMPLES, 784, generator=generator)
    inputs = ((prototypes[targets] + noise).clamp(0, 1)).to(device)
    targets = targets.to(device)
    torch.manual_seed(0)
    model = MLP(SPEC).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(200):
        rows = slice(step * 125 % EXAMPLES, step * 125 % EXAMPLES + 125)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return Point(weights, inputs, targets)


def losscli(point: Point, tolerance: float) -> Ends:
    """Searches as ``losscli check`` does, which is how exact the others have to be."""
    data = DataSet({"all": Split(point.inputs, point.targets)})
    device = point.inputs.device
    objective = Objective(point.model, cross_entropy, {}, data, device=device)
    names = list(point.weights)
    with Curvature(objective, point.weights, names, objective.splits["all"]) as curvature:
        found = curvature.extremes(1, tolerance=_TOLERANCE, seed=0)
    return Ends(found.smallest[0].value, found.largest[0].value, found.products)


def by_hand(point: Point, tolerance: float) -> Ends:
    """Differentiates the gradient for each product, of all examples at once."""
    model = point.model
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]

    def product(x: NDArray[np.float64]) -> NDArray[np.float64]:
        v = torch.from_numpy(x).float().to(point.inputs.device).split(sizes)
        loss = F.cross_entropy(model(point.inputs), point.targets)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        directions = [part.view_as(p) for part, p in zip(v, parameters, strict=True)]
        parts = torch.autograd.grad(gradient, parameters, directions)
        return torch.cat([part.reshape(-1) for part in parts]).double().cpu().numpy()

    return _arpack(product, sum(sizes), tolerance)


def curvlinops(point: Point, tolerance: float) -> Ends:
    """The Hessian of curvlinops."""
    from curvlinops import HessianLinearOperator

    model = point.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    data = [(point.inputs, point.targets)]
    operator = HessianLinearOperator(
        model, torch.nn.CrossEntropyLoss(), parameters, data, check_deterministic=False
    )

    def product(x: NDArray[np.float64]) -> NDArray[np.float64]:
        v = torch.from_numpy(x).float().to(point.inputs.device)
        image: Tensor = operator @ v
        return image.double().cpu().numpy()

    return _arpack(product, sum(p.numel() for p in parameters), tolerance)


def _arpack(product: Product, size: int, tolerance: float) -> Ends:
    """Searches both ends at once with SciPy's eigsh, up to the same residual."""
    count = 0

    def matvec(x: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal count
        count += 1
        return product(x.reshape(-1))

    operator = LinearOperator((size, size), matvec=matvec, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    # With ARPACK's default of 20 vectors it would take more products.
    values = eigsh(operator, 2, which="BE", v0=start, ncv=100, tol=tolerance)[0]
    return Ends(float(values.min()), float(values.max()), count)


def measure(rounds: int, device: torch.device) -> dict[str, Any]:
    """Times the contenders in turns; curvlinops only if it is installed."""
    point = train(device)
    data = DataSet({"all": Split(point.inputs, point.targets)})
    objective = Objective(point.model, cross_entropy, {}, data, device=device)
    with Curvature(objective, point.weights, list(point.weights), data.splits["all"]) as curvature:
        found = curvature.extremes(1, tolerance=_TOLERANCE, seed=0)
    pairs = found.smallest[0], found.largest[0]
    residual = max(pair.error for pair in pairs)
    # ARPACK's tolerance is relative to each eigenvalue.
    tolerance = residual / min(abs(pair.value) for pair in pairs)
    them = [losscli, by_hand]
    if importlib.util.find_spec("curvlinops") is not None:
        them.append(curvlinops)
    seconds: dict[str, list[float]] = {contender.__name__: [] for contender in them}
    result: dict[str, Any] = {"residual": residual, "contenders": {}}
    for number in range(rounds + 1):
        for contender in them:
            begun = time.perf_counter()
            ends = contender(point, tolerance)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[contender.__name__].append(time.perf_counter() - begun)
            for value, pair in zip((ends.smallest, ends.largest), pairs, strict=True):
                if abs(value - pair.value) > 2 * residual:
                    raise RuntimeError(f"{contender.__name__} finds {value} for {pair.value}")
            result["contenders"][contender.__name__] = {"products": ends.products}
    for name, times in seconds.items():
        ratios = [t / own for own, t in zip(seconds["losscli"], times, strict=True)]
        entry = result["contenders"][name]
        entry |= {"seconds": statistics.median(times), "of_losscli": statistics.median(ratios)}
        print(f"  {name:<20}{entry['seconds']:8.2f} s  {entry['products']} products", flush=True)
    return result
