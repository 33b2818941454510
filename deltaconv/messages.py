"""The sentences that nodes show on themselves, in English; `locales` has them in other languages.

Whoever says one takes a `Say`: the terminal and reports take `english`, a node takes that of the
page's language. Errors and reports are English everywhere, so that they can be looked up.
"""

from collections.abc import Callable

Say = Callable[..., str]

ENGLISH = {
    "applied": "{replaced} of {total} self-attention layers replaced",
    "applied computation": "computation per step {before}FLOP → {after}FLOP for one picture of "
    "{width} × {height} latent cells",
    "step times": "a step took {before} s with attention, {after} s with blocks",
    "step times by layer": "a step took {after} s with blocks; with attention it would take about "
    "{before} s, by the time of its layers",
    "step time": "a step took {seconds} s",
    "step times stock": "a step took {seconds} s with self-attention",
    "saved": "saved as {file} in {folder}",
    "prompt known": "All {count} words are known to the demo model.",
    "prompt known word": "The word is known to the demo model.",
    "prompt empty": "Empty prompt: the model draws without guidance.",
    "prompt unknown": "Unknown to the demo model, and ignored: {words}. It knows {count} words of "
    "Unicode emoji names, such as red apple or tiger face.",
    "prompt long": "The demo model reads {most} words; ignored: {words}.",
    "replays": "Replays every model call from the second of its kind on.",
    "replays not on this device": "No effect: ComfyUI runs on {device}, where there are no CUDA "
    "graphs.",
    "replays not with dynamic VRAM": "No effect with dynamic VRAM, in which weights can move "
    "between calls. Start ComfyUI with --disable-dynamic-vram or --highvram.",
    "download asks": "asking {repo}, or waiting for another download of this file",
    "download at": "{done} of {total} MB",
    "downloaded": "downloaded {size} from {repo} into {path}",
    "found": "found {path}",
    "found, not compared": "found {path}; its hash is not known, so it was not compared",
    "found, another": "found {path}, which is not the file of {repo}: its hash is another. It is "
    "used as it is; remove or rename it to download that one",
    "at samples": "own samples {share}",
    "at initialization": "initialization {share}",
    "at choice": "choosing layers {share}",
    "at layers": "layers {step}/{steps}",
    "at joint": "joint {step}/{steps}",
    "loss": "{at}, loss {loss}",
    "left": "{at}, {time} left",
    "folder": "{at}, folder {folder}",
    "interrupted before": "interrupted before it began, folder {folder}",
    "interrupted unsaved": "interrupted at {at}, before anything was saved",
    "interrupted with samples": "interrupted at {at}, before anything was saved; the own samples "
    "drawn so far are kept",
    "interrupted initialized": "interrupted at {at}, saved after the initialization. To go on, "
    "queue again with folder {folder}",
    "interrupted saved": "interrupted at {at}, saved after {steps} steps. To go on, queue again "
    "with folder {folder}",
    "failed before": "failed before it began, folder {folder}",
    "failed unsaved": "failed at {at}, before anything was saved",
    "failed with samples": "failed at {at}, before anything was saved; the own samples drawn so "
    "far are kept",
    "failed initialized": "failed at {at}, saved after the initialization. To go on, queue again "
    "with folder {folder}",
    "failed saved": "failed at {at}, saved after {steps} steps. To go on, queue again with folder "
    "{folder}",
}


def english(key: str, **values: object) -> str:
    """The sentence `key` with its `values`."""
    return ENGLISH[key].format(**values)
