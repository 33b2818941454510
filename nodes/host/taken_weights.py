"""Say where another node takes the weights of a MODEL, which leaves its blocks behind.

A merge reads the weights of its second model, a node that saves a model those of it; blocks lie in
a model of their own. ComfyUI calls no one back when weights are read, so the methods that read them
are covered on each of our own patchers.
"""

from collections.abc import Callable
from functools import partial
from weakref import ReferenceType, ref

from comfy.model_patcher import ModelPatcher

# (kind, sentence) → None.
Say = Callable[[str, str], None]

_MERGED = (
    "ΔConv: a merge takes the weights of its second model alone, so the blocks on that model do "
    "not come along. Connect Apply ΔConv after the merge."
)
_SAVED = (
    "ΔConv: what is saved are the model's weights, so the file is the model with self-attention "
    "and without blocks. Keep them by Save ΔConv Weights, and connect Apply ΔConv when you load "
    "the file."
)


def say_what_is_taken(patcher: ModelPatcher, say: Say) -> None:
    """From now on `say` is called when a node takes this patcher's weights to merge or save."""
    own = ref(patcher)
    patcher.get_key_patches = partial(_merged, own, say)
    patcher.state_dict_for_saving = partial(_saved, own, say)


def take_silently(patcher: ModelPatcher) -> None:
    """Undo `say_what_is_taken`."""
    for name in ("get_key_patches", "state_dict_for_saving"):
        vars(patcher).pop(name, None)


def _merged(own: ReferenceType[ModelPatcher], say: Say, filter_prefix: str | None = None):
    patcher = own()
    # Without a prefix it is ComfyUI itself that asks, for the weights of hooks.
    if filter_prefix:
        say("merged", _MERGED)
    return type(patcher).get_key_patches(patcher, filter_prefix)


def _saved(own: ReferenceType[ModelPatcher], say: Say, *arguments, **named):
    patcher = own()
    say("saved", _SAVED)
    return type(patcher).state_dict_for_saving(patcher, *arguments, **named)
