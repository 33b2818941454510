"""Distill ΔConv with its settings node, as ComfyUI calls both: every input is a list."""


def distill(model, **inputs):
    """The node's outputs; inputs of either node by name, the values of both where left out.

    `positive` and `latents` may be lists of several. Without `minutes` its steps are trained.
    """
    from comfyui_deltaconv.nodes.distill import DeltaConvDistill
    from comfyui_deltaconv.nodes.distill_settings import DeltaConvDistillSettings

    lists = {
        name: value if name in ("positive", "latents") and isinstance(value, list) else [value]
        for name, value in inputs.items()
        if value is not None
    }
    names = {entry.id for entry in DeltaConvDistillSettings.define_schema().inputs}
    (settings,) = DeltaConvDistillSettings.execute(
        **{name: value for name, value in lists.items() if name in names}
    ).args
    own = {name: value for name, value in lists.items() if name not in names}
    return DeltaConvDistill.execute([model], settings=[settings], **own).args
