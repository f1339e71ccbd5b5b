"""Which of a file's tensors are the model's: the body, inside a larger model or a wrapper, and its head."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from fcvit_jax.convert.layouts import LAYOUTS, Arrays, Layout, before_tower, check_family
from fcvit_jax.errors import InputError

# Keys that are never needed, inside or beside a body -> why.
_LEFTOVERS = {
    r"(^|\.)((dino|ibot)_head\.|head\.(mlp|last_layer)\.)": "the head of self-supervised training",
    r"(^|\.)n_averaged$": "the number of steps that were averaged",
}


class Head(NamedTuple):
    """The keys of a classifier, a weight and a bias, and of the other ones that it was chosen from."""

    weight: str
    bias: str
    others: tuple[str, ...] = ()


def find_body(arrays: Arrays) -> tuple[Arrays, str, Arrays]:
    """Find the tensors of the ViT under the keys of its layout, the prefix that was removed, and all other tensors.

    The kernel of the patch embedding, which has its own name in every layout, shows the prefix. Raises InputError if
    there are several.
    """
    prefixes: dict[str, None] = {}
    for key, array in arrays.items():
        places = (0, *(found.end() for found in re.finditer(r"\.", key))) if array.ndim == 4 else ()
        if (place := next((place for place in places if _is_patch_kernel(key[place:])), None)) is not None:
            prefixes[key[:place]] = None
    if not prefixes or "" in prefixes:
        return arrays, "", {}
    check_family(arrays)  # by the whole keys
    if len(prefixes) > 1:
        listed = ", ".join(prefix.rstrip(".") for prefix in prefixes)
        raise InputError(f"the file holds several models ({listed}): choose one with --key NAME")
    prefix = next(iter(prefixes))
    outer = before_tower(prefix)
    if any(key.startswith(outer) and not key.startswith(prefix) for key in arrays):
        prefix = outer  # the layout handles text towers and projections
    elif all(key.startswith(f"{prefix}trunk.") for key in arrays):
        prefix += "trunk."  # open_clip's tower around a timm model, alone
    body = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
    return body, prefix, {key: array for key, array in arrays.items() if not key.startswith(prefix)}


def _is_patch_kernel(key: str) -> bool:
    return any((found := layout.find(key)[0]) and found[0] == "embed/kernel" for layout in LAYOUTS)


def leftover(key: str) -> str | None:
    """Return why a key that no layout knows is dropped, None if it is not."""
    return next((reason for pattern, reason in _LEFTOVERS.items() if re.search(pattern, key)), None)


def find_head(unknown: Arrays, layout: Layout, width: int, num_classes: int | None) -> Head | None:
    """Find the classifier among the keys that a layout does not know, by its shape: weight [c, width] and bias [c].

    The weight may also be twice as wide (class token beside the patches' mean), and is transposed in Flax's layouts.
    None if there is none with `num_classes`. Raises InputError if there are several, or if they may be layers of one.
    """
    weight_name, flax = ("kernel", True) if "head/kernel" in layout.table else ("weight", False)
    heads, taken = {}, set()
    for key, array in unknown.items():
        bias = unknown.get(f"{key.removesuffix(weight_name)}bias")
        if not key.endswith(weight_name) or array.ndim != 2 or bias is None:
            continue
        inputs, classes = array.shape if flax else array.shape[::-1]
        if inputs in (width, 2 * width) and bias.shape == (classes,):
            heads[key] = classes
            taken.add(inputs)
    chosen = [key for key, classes in heads.items() if num_classes in (None, classes)]
    if not heads or not chosen:
        return None
    listed = ", ".join(f"{key} with {classes} outputs" for key, classes in heads.items())
    if len(heads) > 1 and taken & {*heads.values()}:
        raise InputError(f"the head may have several layers ({listed}): pass --num_classes 0 for the backbone alone")
    if len(chosen) > 1:
        raise InputError(f"there are several heads ({listed}): choose one with --num_classes N, or none with 0")
    pairs = {key: f"{key.removesuffix(weight_name)}bias" for key in heads}
    others = tuple(name for key in heads if key != chosen[0] for name in (key, pairs[key]))
    return Head(chosen[0], pairs[chosen[0]], others)


def outside(keys: Iterable[str], layout: Layout) -> set[str]:
    """Select the keys that a layout does not know, and that are in no module of the body."""
    known = {_module(key, layout) for key in keys if (found := layout.find(key)[0]) and "head" not in found[0]}
    return {key for key in keys if layout.find(key)[0] is None and _module(key, layout) not in known}


def _module(key: str, layout: Layout) -> str:
    return re.split(r"[./]", re.sub(f"^({layout.prefix})", "", key))[0]
