"""Object patches of other nodes on paths above, at or below ours.

ComfyUI restores object patches in the order in which it put them on. Where one path leads through
what another patch exchanged, as `…attn1.forward` through an exchanged `…attn1`, that leaves
forwards on the wrong modules. Only the reverse of that order is exact, so it is what stands in the
backup of a model that carries patches of ours.
"""

import itertools
from collections.abc import Mapping
from contextlib import suppress

import comfy.utils
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, PatcherInjection

_KEY = "deltaconv_restoration"


class PatchedView:
    """What paths of a patcher's model lead to with `patches` on it, whatever is loaded now."""

    def __init__(self, patcher: ModelPatcher, patches: Mapping[str, object]):
        self._model = patcher.model
        # Owners are kept: the identity of a dead one could be given anew.
        self._changed: dict[tuple[int, str], tuple[object, object]] = {}
        # What stands in the backup comes back, in that order, before anything else is put on.
        for path, value in [*patcher.object_patches_backup.items(), *patches.items()]:
            # ComfyUI itself will say that such a path leads nowhere, where it cannot load it.
            with suppress(AttributeError):
                owner, name = self.place(path)
                self._changed[id(owner), name] = owner, value

    def place(self, path: str) -> tuple[object, str]:
        """The object that holds the last attribute of `path`, and that attribute's name."""
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
    """The forward at `path` that a patch put there by `patcher` finds, below that patch.

    Raises ValueError where another node exchanged a module above it for one that has no such layer.
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
    """Have the object patches of this patcher and its clones restored last first."""
    patcher.set_injections(_KEY, [PatcherInjection(_reverse_backup, _leave)])
    patcher.remove_callbacks_with_key(CallbacksMP.ON_DETACH, _KEY)
    patcher.add_callback_with_key(CallbacksMP.ON_DETACH, _KEY, _clear_failed_load)


def restore_in_order(patcher: ModelPatcher) -> None:
    """Undo `restore_in_reverse`."""
    patcher.remove_injections(_KEY)
    patcher.remove_callbacks_with_key(CallbacksMP.ON_DETACH, _KEY)


def _reverse_backup(patcher: ModelPatcher) -> None:
    """Injection, run once all object patches are on: what was put on last is to come off first."""
    backup, patches = patcher.object_patches_backup, patcher.object_patches
    put_on = [path for path in patches if path in backup]
    # Injections are taken out and in again while a model is loaded: reverse once.
    if len(put_on) < 2 or [path for path in backup if path in patches] != put_on:
        return
    # A clone of an injected patcher counts as injected, though the model carries other patches.
    if comfy.utils.get_attr(patcher.model, put_on[-1]) is patches[put_on[-1]]:
        for path in reversed(list(backup)):
            backup[path] = backup.pop(path)


def _leave(_: ModelPatcher) -> None:
    """Nothing of the injection is on the model itself."""


def _clear_failed_load(patcher: ModelPatcher, unpatched: bool) -> None:
    """ON_DETACH callback: forwards that stand on a wrong module after loading weights failed.

    ComfyUI then restores what it put on before any injection has run.
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
