"""The scores of tokens are computed a few rows at a time, and no loss changes."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from losscli.data import DataSet, Split
from losscli.errors import ModelError
from losscli.evaluation import objective
from losscli.evaluation.losses import built_in as losses
from losscli.evaluation.losses.built_in import PerExample, causal_lm, token_cross_entropy
from losscli.evaluation.losses.metrics import accuracy, perplexity
from losscli.evaluation.objective import Objective
from losscli.evaluation.strategies import deferred_head
from losscli.evaluation.strategies.base import Strategy
from losscli.evaluation.strategies.deferred_head import DeferredHead, DeferredProduct, head_weight
from losscli.evaluation.sweep import sweep
from losscli.evaluation.task_checks import check_task
from losscli.weight_space.slices import Line
from tests import oracle
from tests.cases import sample
from tests.libraries import Library

transformers: Any = Library("transformers")

V, T, N, WIDTH = 41, 8, 6, 12
ALPHAS = [0.0, 0.25, 0.5, 1.0, 1.5]

# Rows of a block in these tests.
BLOCK = 6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred_head, "_SMALL", 1)
    monkeypatch.setattr(losses, "_ROWS", 5)
    monkeypatch.setattr(losses, "_CHUNK", 3 * V)


class Decoder(nn.Module):
    """A model of a user's own with a head; `then` is what it does with the scores."""

    def __init__(self, then: Callable[[Decoder, Tensor, Tensor], Any], *, tied: bool) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(V, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, V, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight
        self.then = then

    def forward(self, tokens: Tensor) -> Any:
        hidden = torch.tanh(self.middle(self.embedding(tokens)))
        return self.then(self, hidden, self.head(hidden))


def returned(model: Decoder, hidden: Tensor, scores: Tensor) -> Tensor:
    return scores


def in_a_mapping(model: Decoder, hidden: Tensor, scores: Tensor) -> dict[str, Tensor]:
    return {"logits": scores}


def capped(model: Decoder, hidden: Tensor, scores: Tensor) -> Tensor:
    return 3 * torch.tanh(scores / 3)


def modified(model: Decoder, hidden: Tensor, scores: Tensor) -> Tensor:
    scores[..., 0] -= 1
    return scores.mul_(2)


def transposed(model: Decoder, hidden: Tensor, scores: Tensor) -> Tensor:
    return scores.transpose(0, 1).contiguous().transpose(0, 1)


def used_twice(model: Decoder, hidden: Tensor, scores: Tensor) -> Tensor:
    return scores + model.head(hidden.flip(1)).flip(1)


def input_overwritten(model: Decoder, hidden: Tensor, scores: Tensor) -> Tensor:
    hidden.zero_()
    return scores


def input_overwritten_by_out(model: Decoder, hidden: Tensor, scores: Tensor) -> Tensor:
    torch.sub(hidden, hidden, out=hidden)
    return scores


USES = [
    returned, in_a_mapping, capped, modified, transposed, used_twice, input_overwritten,
    input_overwritten_by_out,
]  # fmt: skip


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=WIDTH, n_layer=2, n_head=2, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def plain_layers() -> nn.Module:
    """Layers of torch alone, of which the first weight is computed only where it is used."""
    model = nn.Sequential(nn.Embedding(V, WIDTH), nn.Tanh(), nn.Linear(WIDTH, V, bias=False))
    model[2].weight = model[0].weight
    return model


BUILDS: dict[str, Callable[[], nn.Module]] = {
    **{use.__name__: lambda use=use: Decoder(use, tied=False) for use in USES},
    "tied": lambda: Decoder(returned, tied=True),
    "plain_layers": plain_layers,
    "gpt2": gpt2,
    "llama": llama,
}


def data() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(V, (N, T), generator=torch.Generator().manual_seed(1))
    targets = tokens.clone()
    targets[0, 3:] = -100
    return tokens, targets


def states(build: Callable[[], nn.Module]) -> list[dict[str, Tensor]]:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        # Larger than they are drawn, so that the scores differ.
        found.append({name: 3 * tensor for name, tensor in build().state_dict().items()})
    return found


def objective_of(
    build: Callable[[], nn.Module],
    loss: PerExample = causal_lm,
    dtype: torch.dtype = torch.float32,
    metrics: dict[str, PerExample] | None = None,
) -> Objective:
    split = DataSet({"all": Split(*data())})
    metrics = {"perplexity": perplexity} if metrics is None else metrics
    return Objective(
        build(), loss, metrics, split, device=torch.device("cpu"), dtype=dtype, batch_size=4
    )


def by_hand(outputs: Any, targets: Tensor) -> Tensor:
    """One sequence: the mean over its tokens of −log softmax at the token that follows."""
    outputs = outputs["logits"] if isinstance(outputs, dict) else outputs
    (scores,), (row,) = getattr(outputs, "logits", outputs), targets.tolist()
    lost = [
        float(scores[t].logsumexp(0) - scores[t, row[t + 1]])
        for t in range(len(row) - 1)
        if row[t + 1] != -100
    ]
    return torch.tensor(math.fsum(lost) / len(lost), dtype=torch.float64)


class Products(TorchDispatchMode):
    """Collects the numbers of rows of the products over the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not func.is_view and found.shape[-1:] == (V,):
            self.rows.append(found.shape[:-1].numel())
        return found


@pytest.mark.parametrize("name", BUILDS)
def test_the_losses_of_a_line_are_those_of_a_plain_float64_loop(name: str) -> None:
    build, found = BUILDS[name], objective_of(BUILDS[name])
    a, b = states(build)
    check_task(found, a)
    moving = [n for n in dict(found.model.named_parameters()) if n in a]
    losses_ = sweep(found, Line(*({n: s[n] for n in moving} for s in (a, b))), [
        (x,) for x in ALPHAS
    ])["all"].losses  # fmt: skip
    assert found.strategy is not Strategy.LOADED
    for alpha, row in zip(ALPHAS, losses_.tolist(), strict=True):
        truth = oracle.losses(build, oracle.blend(a, b, alpha), *data(), by_hand)
        assert row == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize(
    "name", sample(["returned", "gpt2", "tied", "in_a_mapping", "llama"], 0, 2)
)
def test_no_more_rows_than_a_block_are_in_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = objective_of(BUILDS[name])
    monkeypatch.setattr(Objective, "count_operations", lambda self, trace=None: 1)
    with Products() as products:
        check_task(found, states(BUILDS[name])[0])
        found.at(Line({}, {}), [(0.0,), (1.0,)])
    assert products.rows
    assert max(products.rows) <= BLOCK


def own_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return causal_lm(outputs, targets)


@torch.no_grad()
def test_only_losses_that_take_rows_defer() -> None:
    for loss, metrics in (
        (token_cross_entropy, {"accuracy": accuracy}),
        (own_loss, {}),
    ):
        found = objective_of(BUILDS["returned"], loss, metrics=metrics)
        with Products() as products:
            found.values(found.splits["all"].first(4))
        assert max(products.rows) == 4 * T


def test_gradients_are_those_of_the_whole_product() -> None:
    model = BUILDS["returned"]()
    tokens, targets = data()
    with DeferredHead(model.head.weight):
        scores = model(tokens)
    assert type(scores) is Tensor
    causal_lm(scores, targets).sum().backward()
    assert model.embedding.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_every_type_has_the_losses_of_its_own_scores(dtype: torch.dtype) -> None:
    """The same numbers as of the product as a whole, but for the order of sums in it."""
    found = objective_of(BUILDS["tied"], dtype=dtype)
    found.load(states(BUILDS["tied"])[0])
    batch = found.splits["all"].first(N)
    with Products() as products:
        deferred = found.values(batch)["loss"]
    assert max(products.rows) <= BLOCK
    found._head = None
    whole = found.values(batch)["loss"]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(deferred, whole, rtol=max(4 * eps, 1e-6), atol=0)


OPERATIONS: list[Callable[[Any], Any]] = [
    lambda p: p.shape, lambda p: p.dtype, lambda p: p.device, lambda p: p.ndim, len,
    lambda p: p.size(-1), lambda p: p.nbytes, lambda p: p.numel(), lambda p: p._version,
    lambda p: p.is_floating_point(), lambda p: p.requires_grad, lambda p: p.stride(),
    lambda p: p[1:3], lambda p: p[::2], lambda p: p[1], lambda p: p[..., 0], lambda p: p[:, 1],
    lambda p: p[p > 0], lambda p: p[-1:], lambda p: p[5:], lambda p: p.flatten(0, -2)[3:5],
    lambda p: p.flatten(0, -2).shape, lambda p: p.flatten(), lambda p: p.flatten(1),
    lambda p: p.sum(), lambda p: p.argmax(-1), lambda p: 1 + p, lambda p: p @ p.mT, lambda p: -p,
    lambda p: p.clone(), lambda p: p.float(), lambda p: p.half(), lambda p: p.view(-1),
    lambda p: p.reshape(-1, 2), lambda p: p.tolist(), lambda p: p.numpy().tolist(), repr,
    lambda p: p.detach(), lambda p: p.data, lambda p: p.contiguous(), lambda p: list(p.unbind()),
    lambda p: torch.stack([p, p]), lambda p: torch.cat((p, p), dim=1), lambda p: torch.equal(p, p),
    lambda p: torch.equal(p, p + 1), lambda p: torch.add(input=p, other=p), lambda p: p.add_(1),
    lambda p: (p.zero_(), p + 0)[1], lambda p: (p.__setitem__(0, 1.0), p + 0)[1],
    torch.relu_, copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)),
    torch.func.vmap(torch.sum), lambda p: F.softmax(p, -1), lambda p: p.to("cpu"),
    torch.ops.aten.sum.default, lambda p: torch.add(torch.ones(2, 3, 5), 1, out=p),
    lambda p: p.is_contiguous(), lambda p: p.untyped_storage().nbytes(),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(OPERATIONS)))
@torch.no_grad()
def test_a_deferred_product_answers_as_the_product(number: int) -> None:
    torch.manual_seed(0)
    operands = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    operation = OPERATIONS[number]
    found = operation(DeferredProduct(*operands))
    expected = operation(F.linear(*operands))
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected)
    elif not isinstance(expected, list) or not isinstance(expected[0], Tensor):
        assert found == expected or found == pytest.approx(expected)


@torch.no_grad()
def test_an_operand_that_is_modified_unseen_is_refused() -> None:
    def then(model: Decoder, hidden: Tensor, scores: Tensor) -> Tensor:
        # As compiled code does.
        with torch._C.DisableTorchFunction():
            hidden.zero_()
        return scores

    found = objective_of(lambda: Decoder(then, tied=False))
    with pytest.raises(ModelError, match=r"modifies the input or the weight .* in place"):
        found.values(found.splits["all"].first(2))


def test_the_head_is_the_last_linear_layer() -> None:
    model = Decoder(returned, tied=True)
    assert head_weight(model) is model.embedding.weight
    assert head_weight(nn.Embedding(2, 2)) is None
    assert head_weight(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) is None


@pytest.mark.parametrize("build", sample([gpt2, llama], 0, 2))
def test_blocks_of_a_large_model_share_what_comes_before(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its line is evaluated a point at a time, and each block from where it begins."""
    a, b = states(build)
    found = objective_of(build)
    names = [n for n, t in a.items() if t.is_floating_point() and n != "lm_head.weight"]
    block = [n for n in names if ".1." in n]
    size = sum(found.tensors[name].nbytes for name in block)
    monkeypatch.setattr(objective, "_LARGE", size)
    assert found.is_large(names)
    calls = 0
    layer = next(m for n, m in found.model.named_modules() if n.endswith(".0"))

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    layer.register_forward_hook(count)
    coordinates = [(x,) for x in ALPHAS]
    for moved in (names, block):
        found.load(a)
        line = Line(*({name: state[name] for name in moved} for state in (a, b)))
        rows = sweep(found, line, coordinates)["all"].losses
        assert found.strategy is (None if moved is names else Strategy.SHARED)
    for alpha, row in zip(ALPHAS, rows.tolist(), strict=True):
        point = {**a, **{n: oracle.blend(a, b, alpha)[n] for n in block}}
        assert row == pytest.approx(oracle.losses(build, point, *data(), by_hand), rel=1e-5)
