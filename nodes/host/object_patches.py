"""Keep the model exact when other nodes patch paths above, at or below ours.

ComfyUI restores object patches in the order in which it applied them. If one path leads through an
object that another patch exchanged, as `…attn1.forward` through an exchanged `…attn1`, that order
leaves forwards on the wrong modules. The reverse order is exact: models with our patches get it.
"""

import itertools
from collections.abc import Mapping
from contextlib import suppress

import comfy.utils
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, PatcherInjection

_KEY = "deltaconv_restoration"


class PatchedView:
    """Resolve paths of a patcher's model as if `patches` were applied, whatever is loaded now."""

    def __init__(self, patcher: ModelPatcher, patches: Mapping[str, object]):
        self._model = patcher.model
        # Keep the owners alive: Python may reuse the id of a dead one.
        self._changed: dict[tuple[int, str], tuple[object, object]] = {}
        # ComfyUI restores its backup, in that order, before it applies other patches.
        for path, value in [*patcher.object_patches_backup.items(), *patches.items()]:
            # ComfyUI itself reports a path that leads nowhere when it loads the model.
            with suppress(AttributeError):
                owner, name = self.place(path)
                self._changed[id(owner), name] = owner, value

    def place(self, path: str) -> tuple[object, str]:
        """`path` → the object that has its last attribute, and that attribute's name."""
        *parents, name = path.split(".")
        owner = self._model
        for parent in parents:
            owner = self._attribute(owner, parent)
        return owner, name

    def __getitem__(self, path: str) -> object:
        return self._attribute(*self.place(path))

    def _attribute(self, owner: object, name: str) -> object:
        if (id(owner), name) in self._changed:
            return self._changed[id(owner), name][1]
        return getattr(owner, name)


def stock_forward(patcher: ModelPatcher, path: str) -> object:
    """The forward at `path` beneath this patcher's own patch on it.

    Raises ValueError if another node exchanged a module above it for one without such a layer.
    """
    earlier = itertools.takewhile(lambda entry: entry[0] != path, patcher.object_patches.items())
    try:
        return PatchedView(patcher, dict(earlier))[path]
    except AttributeError:
        layer = path.removeprefix("diffusion_model.").removesuffix(".forward")
        raise ValueError(
            f"Expected a self-attention layer at {layer}, got none: another node exchanged a "
            "module above it. Apply that node after this one, or leave the layer out by sites."
        ) from None


def restore_in_reverse(patcher: ModelPatcher) -> None:
    """Restore the object patches of this patcher and its clones in reverse order."""
    patcher.set_injections(_KEY, [PatcherInjection(_reverse_backup, _leave)])
    patcher.remove_callbacks_with_key(CallbacksMP.ON_DETACH, _KEY)
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, _KEY, _clear_failed_load)


def restore_in_order(patcher: ModelPatcher) -> None:
    """Undo `restore_in_reverse`."""
    patcher.remove_injections(_KEY)
    patcher.remove_callbacks_with_key(CallbacksMP.ON_DETACH, _KEY)


def _reverse_backup(patcher: ModelPatcher) -> None:
    """Injection, runs after all object patches are applied: reverse ComfyUI's backup."""
    backup, patches = patcher.object_patches_backup, patcher.object_patches
    put_on = [path for path in patches if path in backup]
    # Reverse only once: ComfyUI ejects and injects again while a model is loaded.
    if len(put_on) < 2 or [path for path in backup if path in patches] != put_on:
        return
    # Check the model itself: a clone of an injected patcher counts as injected.
    if comfy.utils.get_attr(patcher.model, put_on[-1]) is patches[put_on[-1]]:
        for path in reversed(list(backup)):
            backup[path] = backup.pop(path)


def _leave(_: ModelPatcher) -> None:
    """Ejection: nothing to undo on the model itself."""


def _clear_failed_load(patcher: ModelPatcher, unpatched: bool) -> None:
    """ON_DETACH callback: remove forwards left on a wrong module when loading weights failed.

    ComfyUI restores before any injection has run in that case.
    """
    if not unpatched:
        return
    view = PatchedView(patcher, patcher.object_patches)
    for path, patch in patcher.object_patches.items():
        if not path.endswith(".forward"):
            continue
        try:
            stock, exchanged = comfy.utils.resolve_attr(patcher.model, path)[0], view.place(path)[0]
        except AttributeError:
            continue
        if stock is not exchanged and _misplaced(stock, patch, exchanged):
            for owner, other in ((stock, exchanged), (exchanged, stock)):
                if _misplaced(owner, patch, other):
                    del owner.forward


def _misplaced(owner: object, patch: object, other: object) -> bool:
    """Whether the forward set on `owner` is `patch`, or the method of `other`."""
    own = vars(owner).get("forward")
    return own is patch or (own is not None and getattr(own, "__self__", None) is other)
