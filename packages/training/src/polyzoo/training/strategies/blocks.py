"""Which parts of a model are gathered and released as one."""

from __future__ import annotations

from collections import Counter

from torch import nn


def shard_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model, outermost first in the order of their names.

    A block is an element of an nn.ModuleList or nn.Sequential of at least two of its class, with
    parameters that no module outside of it shares. Everything else is gathered with the model.
    """
    owners = Counter(
        parameter for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    chosen: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for container in model.modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential) or container in inside:
            continue
        kinds = Counter(type(child) for child in container)
        for child in container:
            if kinds[type(child)] > 1 and _is_apart(child, owners):
                chosen.append(child)
                inside.update(child.modules())
    return chosen


def _is_apart(block: nn.Module, owners: Counter[nn.Parameter]) -> bool:
    """Tell whether a block has parameters, all of them its own."""
    own = Counter(
        parameter for module in block.modules() for parameter in module.parameters(recurse=False)
    )
    return bool(own) and all(owners[parameter] == count for parameter, count in own.items())


def full_size(parameter: nn.Parameter) -> int:
    """Return the elements of a parameter, of which this process may hold a part."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
