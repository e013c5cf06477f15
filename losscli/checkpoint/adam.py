"""The moments of Adam in the state dict of an optimiser, matched with the parameters of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn

from losscli.checkpoint.names import strip_wrappers
from losscli.errors import CheckpointError, one_line
from losscli.wording import list_first

__all__ = ["AdamState", "ModelParameters", "find_adam_state", "find_optimizers"]

_RESAVE = "Save optimizer.state_dict() of torch.optim.Adam or AdamW"

# The most keys above the state of an optimiser.
_DEPTH = 4

# The state of a parameter in torch's Adam and AdamW.
_MOMENTS = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})

# Most partial assignments of parameters to groups that are compared at once.
_MOST_PARTIAL = 10_000


@dataclass(frozen=True)
class ModelParameters:
    """The parameters of a model.

    Attributes:
        names: Each name of a parameter, in the model's order, and the name that stands for it:
            a tied parameter has several.
        shapes: The shapes, by the names that stand for them.
    """

    names: Mapping[str, str]
    shapes: Mapping[str, Size]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> ModelParameters:
        """Lists the parameters among the tensors of a model; the last of tied names stands."""
        parameters = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter)}
        last = {id(tensor): name for name, tensor in parameters.items()}
        names = {name: last[id(tensor)] for name, tensor in parameters.items()}
        return cls(names, {name: parameters[name].shape for name in names.values()})


@dataclass(frozen=True)
class AdamState:
    """The state of Adam for some parameters of a model.

    Attributes:
        second_moments: v of each parameter: ``exp_avg_sq``, or ``max_exp_avg_sq`` for AMSGrad.
        steps: t of each parameter. Both are empty before the first step.
        learning_rate: η; None if the groups of the parameters have different ones.
        betas: (β₁, β₂).
        epsilon: ε.
        amsgrad: Whether it is AMSGrad.
        weight_decay: The largest weight decay of the parameters.
        matched_by: ``names`` or ``shapes``.
    """

    second_moments: Mapping[str, Tensor]
    steps: Mapping[str, int]
    learning_rate: float | None
    betas: tuple[float, float]
    epsilon: float
    amsgrad: bool
    weight_decay: float
    matched_by: str


@dataclass(frozen=True)
class _Entry:
    """A parameter in the state of an optimiser.

    Attributes:
        name: Its name; empty if unknown.
        group: The options of its group.
        state: Its moments; empty before its first step.
        steps: The number t of its steps.
    """

    name: str
    group: Mapping[str, Any]
    state: Mapping[str, Any]
    steps: int

    @property
    def shape(self) -> Size | None:
        """Its shape; None before its first step."""
        moment = self.state.get("exp_avg_sq")
        return moment.shape if isinstance(moment, Tensor) else None


def find_optimizers(content: Any, label: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yields the state dicts of optimisers in the content of a file, each with its dotted key.

    A state dict of an optimiser has ``state`` and ``param_groups``. ``label`` is the dotted key of
    ``content``, and ``depth`` the number of keys in it.
    """
    if depth > _DEPTH:
        return
    items: list[tuple[Any, Any]] = []
    if isinstance(content, Mapping):
        groups = content.get("param_groups")
        if isinstance(content.get("state"), Mapping) and isinstance(groups, list):
            yield label, content
            return
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content))
    for key, value in items:
        if isinstance(value, Mapping | list):
            yield from find_optimizers(value, f"{label}.{key}" if label else str(key), depth + 1)


def find_adam_state(
    name: str, optimizers: Mapping[str, Any], parameters: ModelParameters, wanted: Sequence[str]
) -> AdamState:
    """Returns the state of Adam for the ``wanted`` parameters of a model.

    Parameters are matched by ``param_names``. Without these, each group of the optimiser must have
    its parameters in the order of the model, and only one assignment may have the right shapes.

    Args:
        name: The checkpoint, for errors.
        optimizers: The state dicts of `find_optimizers`.
        parameters: Those of the model.
        wanted: The parameters of which the moments are needed.

    Raises:
        CheckpointError: There is no state of Adam, its moments are quantised, or they cannot be
            matched.
    """
    if not any(state["param_groups"] for state in optimizers.values()):
        raise CheckpointError(
            f"{name} has no state of an optimiser",
            "Save optimizer.state_dict() under the key optimizer, or record with moments=True",
        )
    found: dict[str, AdamState] = {}
    errors = []
    for key, state in optimizers.items():
        where = f"{name}: the optimiser state under {key!r}" if key else f"{name}"
        try:
            found[key] = _read(where, state, parameters, wanted)
        except CheckpointError as error:
            errors.append(error)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # of any other content
            errors.append(
                CheckpointError(
                    f"{where} has another form than that of torch: {one_line(error)}", _RESAVE
                )
            )
    if not found:
        raise errors[0]
    if len(found) > 1:
        keys = ", ".join(map(repr, found))
        raise CheckpointError(
            f"{name} has several optimiser states with moments of these parameters: {keys}",
            "Save a checkpoint with one of them",
        )
    return next(iter(found.values()))


def _read(
    where: str, state: Mapping[str, Any], parameters: ModelParameters, wanted: Sequence[str]
) -> AdamState:
    groups = list(_entries(where, state))
    entries = [entry for group in groups for entry in group]
    own: dict[str, _Entry] = {}
    how = ""
    if any(entry.steps for entry in entries):
        matched, how = _match(where, groups, parameters)
        missing = [name for name in wanted if name not in matched or not matched[name].steps]
        if missing:
            raise CheckpointError(
                f"{where} has no moments of {list_first(missing)}",
                "Choose the parameters that were trained with --only or --except",
            )
        own = {name: matched[name] for name in wanted}
    used = [entry.group for entry in own.values() or entries]
    betas = {tuple(_number(where, beta, 1) for beta in group["betas"]) for group in used}
    epsilons = {_number(where, group["eps"]) for group in used}
    kinds = {bool(group["amsgrad"]) for group in used}
    if max(len(betas), len(epsilons), len(kinds)) > 1:
        raise CheckpointError(
            f"{where} has groups of parameters with different betas, eps or amsgrad",
            "Choose the parameters of one group with --only or --except",
        )
    (amsgrad,), ((beta1, beta2),) = kinds, betas
    rates = {_number(where, group["lr"]) for group in used}
    moments = {}
    for name, entry in own.items():
        moment = entry.state.get("max_exp_avg_sq" if amsgrad else "exp_avg_sq")
        if not isinstance(moment, Tensor) or moment.is_meta or moment.layout != torch.strided:
            raise CheckpointError(
                f"{where} has no second moments of {name}, or sparse ones", _RESAVE
            )
        if moment.shape != parameters.shapes[name]:
            raise CheckpointError(
                f"{where} has second moments of {name} of shape {list(moment.shape)}, and the "
                f"parameter has {list(parameters.shapes[name])}",
                "Name a checkpoint with the optimiser that trained it",
            )
        if not bool(((moment >= 0) & moment.isfinite()).all()):
            raise CheckpointError(
                f"{where} has second moments of {name} that are negative or not finite",
                "Name a checkpoint before the gradients overflowed",
            )
        moments[name] = moment
    return AdamState(
        moments,
        {name: entry.steps for name, entry in own.items()},
        rates.pop() if len(rates) == 1 else None,
        (beta1, beta2),
        epsilons.pop(),
        amsgrad,
        max(_number(where, group.get("weight_decay", 0.0)) for group in used),
        how,
    )


def _entries(where: str, state: Mapping[str, Any]) -> Iterator[list[_Entry]]:
    """Reads the parameters of each group, and refuses other optimisers than Adam and AdamW."""
    for group in state["param_groups"]:
        params = group["params"]
        own = [state["state"].get(key, {}) for key in params]
        if any("state2" in each or _is_quantised(each) for each in own):
            raise CheckpointError(
                f"{where} has quantised moments (8-bit), from which P cannot be computed",
                "Train with torch.optim.Adam or AdamW",
            )
        # AMSGrad is an option of torch's Adam and AdamW, and of none of its other optimisers.
        other = {key for each in own for key in each} - _MOMENTS
        other |= {"maximize"} if group.get("maximize") else set()
        if not {"lr", "betas", "eps", "amsgrad"} <= group.keys() or other:
            has = f": it has {', '.join(sorted(map(str, other))[:3])}" if other else ""
            raise CheckpointError(
                f"{where} is not that of torch.optim.Adam or AdamW{has}",
                "Leave out --optimizer adam",
            )
        names = group.get("param_names")
        if not (isinstance(names, list) and len(names) == len(params)):
            # Those of torch.distributed have names in the place of numbers.
            names = params
        yield [
            _Entry(
                label if isinstance(label, str) else "",
                group,
                each,
                int(_number(where, each.get("step"))) if each else 0,
            )
            for label, each in zip(names, own, strict=True)
        ]


def _is_quantised(state: Mapping[str, Any]) -> bool:
    moment = state.get("exp_avg_sq")
    return isinstance(moment, Tensor) and not moment.is_floating_point()


def _match(
    where: str, groups: Sequence[Sequence[_Entry]], parameters: ModelParameters
) -> tuple[dict[str, _Entry], str]:
    """Assigns the entries of an optimiser to parameters; returns also how they were matched."""
    entries = [entry for group in groups for entry in group]
    known = {strip_wrappers(name): standing for name, standing in parameters.names.items()}
    plain = {strip_wrappers(entry.name): entry for entry in entries if entry.name}
    starts = (name[: dot.end()] for name in plain for dot in re.finditer(r"\.", name))
    # If the model is a part of what was trained, its parameters have a prefix there.
    found_under = {
        start: {
            known[name[len(start) :]]: entry
            for name, entry in plain.items()
            if name.startswith(start) and name[len(start) :] in known
        }
        for start in dict.fromkeys(["", *starts])
    }
    most = max(map(len, found_under.values()))
    fitting = [start for start, found in found_under.items() if len(found) == most]
    if most and len(fitting) > 1 and fitting[0]:
        raise CheckpointError(
            f"{where} has parameters of several parts with these names: {', '.join(fitting[:3])}",
            "Give a checkpoint with only the optimiser of this model",
        )
    if most:
        return found_under[fitting[0]], "names"
    order = list(parameters.shapes)
    shapes = [[entry.shape for entry in group] for group in groups]
    assigned = _assign(shapes, [parameters.shapes[name] for name in order])
    if assigned is None:
        raise CheckpointError(
            f"{where} has no names of parameters, and their shapes do not match those of the "
            f"model in only one way ({len(entries)} of {len(order)} parameters)",
            "Make the optimiser from model.named_parameters(), or record with moments=True",
        )
    return {order[i]: groups[g][k] for i, (g, k) in assigned.items()}, "shapes"


def _assign(
    groups: Sequence[Sequence[Size | None]], shapes: Sequence[Size]
) -> dict[int, tuple[int, int]] | None:
    """Assigns the entries of groups to parameters with the same shapes, in the same order.

    Args:
        groups: The shapes of the entries of each group; None is any shape.
        shapes: The shapes of the parameters, at least as many.

    Returns:
        The group and the place in it for the index of each parameter that has an entry; None if
        there is not exactly one such assignment.
    """
    skips = len(shapes) - sum(map(len, groups))
    # How many entries of each group are assigned -> in how many ways, and the last step there.
    start = (0,) * len(groups)
    levels: list[dict[tuple[int, ...], tuple[int, int]]] = [{start: (1, -1)}]
    for i, shape in enumerate(shapes):
        level: dict[tuple[int, ...], tuple[int, int]] = {}
        for places, (ways, _) in levels[-1].items():
            steps = [
                (g, (*places[:g], places[g] + 1, *places[g + 1 :]))
                for g, group in enumerate(groups)
                if places[g] < len(group) and group[places[g]] in {None, shape}
            ]
            if i - sum(places) < skips:
                steps.append((-1, places))
            for g, after in steps:
                level[after] = (ways + level.get(after, (0, g))[0], g)
        if len(level) > _MOST_PARTIAL:
            return None
        levels.append(level)
    places = tuple(map(len, groups))
    if levels[-1].get(places, (0, -1))[0] != 1:
        return None
    found = {}
    for i in reversed(range(len(shapes))):
        _, g = levels[i + 1][places]
        if g >= 0:
            places = (*places[:g], places[g] - 1, *places[g + 1 :])
            found[i] = g, places[g]
    return found


def _number(where: str, value: Any, limit: float = math.inf) -> float:
    """Reads a number from 0 to below a limit."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not 0 <= number < limit:
        raise CheckpointError(
            f"{where} has {value!s:.40} as an option or as the step of Adam", _RESAVE
        )
    return number
