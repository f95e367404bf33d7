"""What an optimizer is given to train, as parameter groups with names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from zotune.step.blocks import shallow

NamedParams = Iterable[tuple[str, nn.Parameter]]


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained, by name, a compiled model's by its own. Raises ValueError where there is none."""
    named = [(n.replace("_orig_mod.", ""), p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter: none has requires_grad=True")
    return named


def parameter_groups(params: Any) -> list[dict[str, Any]]:
    """Groups with plain `params` and their `names`, of a module, of (name, parameter), a dict of them, parameters or groups."""
    if isinstance(params, nn.Module):
        params = trainable(params)
    elif isinstance(params, Mapping):
        if "params" in params:
            raise ValueError("a group by itself: give a list of groups, [{'params': …}]")
        params = params.items()  # dict(model.named_parameters()), as state_dict has them
    params = list(params)
    if not params:
        raise ValueError("no parameters to optimize")
    if not isinstance(params[0], dict):
        params = [{"params": params}]
    groups: list[dict[str, Any]] = []
    for group in params:
        groups.append(named_group(group, offset=sum(len(g["params"]) for g in groups)))
    return groups


def named_group(group: dict[str, Any], offset: int) -> dict[str, Any]:
    """A group with plain `params` and their `names`; parameters without one are named by their position."""
    given = group["params"].items() if isinstance(group["params"], Mapping) else group["params"]
    given = [given] if isinstance(given, Tensor) else list(given)
    pairs = [p if isinstance(p, tuple) else (f"param.{offset + i}", p) for i, p in enumerate(given)]
    for name, param in pairs:
        if not isinstance(param, Tensor) or not param.is_floating_point():
            raise ValueError(
                f"parameter {name!r} is {getattr(param, 'dtype', type(param).__name__)}: only floating-point tensors "
                "can be perturbed; freeze it (requires_grad=False) and train an adapter on top"
            )
    rest = {k: v for k, v in group.items() if k != "params"}
    return {**rest, "params": [p for _, p in pairs], "names": [n for n, _ in pairs]}


def by_order(
    groups: Sequence[dict[str, Any]], first_order: bool, hybrid: float | None, fo_lr: float | None
) -> list[dict[str, Any]]:
    """The groups, marked first_order where back-propagation trains them; hybrid training cuts each in two."""
    if first_order:
        return [group | {"first_order": True} for group in groups]
    if hybrid is None:
        return list(groups)
    mine = shallow([name for group in groups for name in group["names"]], hybrid)
    cut = []
    for group in groups:
        pairs = list(zip(group["names"], group["params"], strict=True))
        for deep in (False, True):
            some = [pair for pair in pairs if (pair[0] not in mine) == deep]
            more = {"first_order": True, "lr": fo_lr} if deep else {}
            if some:
                cut.append(group | more | {"names": [n for n, _ in some], "params": [p for _, p in some]})
    return cut
