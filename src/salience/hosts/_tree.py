"""Module trees: what lies inside wrappers, where repeated blocks are, and how to show them in an error."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from torch import nn

from salience.core.errors import StructureError
from salience.hosts._parts import Place, has_attention, join, width

_TREE_LINES = 60
# what DistributedDataParallel, torch.compile and PEFT put in front of a name
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "base_model.model.")


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel, torch.compile and PEFT, in any order of nesting."""
    while True:
        children = dict(model.named_children())
        base = getattr(model, "get_base_model", None)
        if callable(base):
            model = base()
        elif children.keys() == {"module"} or children.keys() == {"_orig_mod"}:
            model = next(iter(children.values()))
        else:
            return model


def path_of(model: nn.Module, module: nn.Module) -> str | None:
    """The dotted path of a module in the model, None if it is not in it."""
    return next((name for name, other in model.named_modules() if other is module), None)


def without_wrappers(name: str) -> str:
    """A parameter's or module's name as the unwrapped model has it."""
    for prefix in WRAPPER_PREFIXES:
        if name.startswith(prefix):
            return without_wrappers(name.removeprefix(prefix))
    return name


def block_lists(part: Place) -> Iterator[Place]:
    """The outermost lists of blocks in a module: lists inside a block (experts, sub-layers) are not entered."""
    for name, child in part.module.named_children():
        inner = Place(join(part.path, name), child)
        if _is_block_list(inner):
            yield inner
        elif width(child) is None:
            yield from block_lists(inner)


def blocks(part: Place) -> list[Place]:
    """The blocks of a list; stages that are lists of blocks themselves (Swin, ALBERT) are laid end to end."""
    items = [Place(join(part.path, name), child) for name, child in part.module.named_children()]
    stages = [_stage_lists(item) for item in items]
    if items and all(len(inner) == 1 for inner in stages):
        return [block for inner in stages for block in blocks(inner[0])]
    return items


def _is_block_list(part: Place) -> bool:
    """A list all of whose items are blocks: modules with parameters, and with modules inside.

    Items of several classes are blocks too (hybrids of attention and state space), unless one of them holds its own
    list of attention blocks: then these are towers, and each has its own stack.
    """
    if not isinstance(part.module, (nn.ModuleList, nn.Sequential)):
        return False
    items = [Place(join(part.path, name), child) for name, child in part.module.named_children()]
    composite = all(
        width(item.module) is None and next(item.module.children(), None) is not None for item in items
    )
    if not items or not composite or not all(size(item.module) for item in items):
        return False
    if len({type(item.module) for item in items}) == 1:
        return True
    return isinstance(part.module, nn.ModuleList) and not any(_stage_lists(item) for item in items)


def _stage_lists(part: Place) -> list[Place]:
    """Lists of whole blocks in a module (or itself): each has an attention and more, together they are most of it.

    A list of bare attentions, or of attention sub-layers beside an MLP, is a part of one block instead.
    """
    lists = [part] if _is_block_list(part) else list(block_lists(part))
    return [
        inner
        for inner in lists
        if 2 * size(inner.module) > size(part.module)
        and all(any(map(has_attention, item.children())) for item in inner.module.children())
    ]


def stack_lists(part: Place) -> list[Place]:
    """The lists of blocks that are the stacks of a network.

    These are all lists with attention, and the list with the most parameters. Smaller lists without attention are
    heads, resamplers and the like. A network without blocks falls back on its largest list of layers of one class.
    """
    lists = list(block_lists(part))
    if lists:
        largest = max(lists, key=lambda inner: size(inner.module))
        return [inner for inner in lists if inner is largest or has_attention(inner.module)]
    leaves = [
        Place(join(part.path, name), module)
        for name, module in part.module.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 1
        and len({type(item) for item in module}) == 1
        and all(size(item) for item in module)
    ]
    return [max(leaves, key=lambda inner: size(inner.module))] if leaves else []


def list_by_hand(model: nn.Module, core: Place, path: str) -> Place:
    """The list of blocks that the user named, by its path in the model or in what the model wraps.

    Raises:
        StructureError: if there is no such list; names the nearest paths.
    """
    for root in (Place("", model), core):
        found = dict(root.module.named_modules()).get(path)
        if isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found):
            return Place(join(root.path, path), found)
    lists = [
        name for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))
    ]
    near = difflib.get_close_matches(path, lists, n=3, cutoff=0.0)
    raise StructureError(
        f"layers must be the dotted path of a ModuleList in {type(model).__name__}, got {path!r}; "
        f"near paths: {', '.join(near) or 'none'}\n{tree(model)}"
    )


def tree(model: nn.Module) -> str:
    """The module tree as text, one line a module; runs of the same class are one line, `layers.[0-3]: Block`."""
    lines = [type(model).__name__, *_tree_lines(model, "")]
    left = len(lines) - _TREE_LINES
    return "\n".join(lines if left <= 0 else [*lines[:_TREE_LINES], f"... {left} more lines"])


def _tree_lines(module: nn.Module, path: str) -> Iterator[str]:
    children = list(module.named_children())
    start = 0
    while start < len(children):
        name, first = children[start]
        end = start
        # only numbered children are repetitions: q_proj and k_proj have one class and two meanings
        while name.isdigit() and end + 1 < len(children) and _alike(children[end + 1][1], first):
            end += 1
        label = name if end == start else f"[{name}-{children[end][0]}]"
        yield f"  {join(path, label)}: {type(first).__name__}"
        yield from _tree_lines(first, join(path, label))
        start = end + 1


def _alike(one: nn.Module, other: nn.Module) -> bool:
    mine, yours = one.named_modules(), other.named_modules()
    return [(name, type(part)) for name, part in mine] == [(name, type(part)) for name, part in yours]


def size(module: nn.Module) -> int:
    """The number of elements of all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
