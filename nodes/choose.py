"""Choose which layers keep attention, and from which step on blocks act."""

import torch
from comfy_api.latest import io

from ..deltaconv.families import native_latent
from .host.pictures import decoded
from .host.sites import find_sites
from .node import Node
from .sockets import CATEGORY, DeltaConv, Recipe

_OWN = "own share"


class DeltaConvChoose(Node):
    """MODEL, DELTACONV and a prompt → the layers and steps that lose least for the time saved."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvChoose",
            display_name="Choose ΔConv Layers",
            category=CATEGORY,
            description="Keep attention where blocks lose most and save least: in some layers, "
            "and in the first steps. Times every layer on your device, measures the error along "
            "the model's own sampling, and draws what each choice costs and brings.",
            search_aliases=["ConvFusion trade-off", "keep attention", "quality against speed"],
            inputs=[
                io.Model.Input("model", tooltip="Without ΔConv applied."),
                DeltaConv.Input("deltaconv", tooltip="The weights to choose layers of."),
                io.Conditioning.Input(
                    "positive", tooltip="Several, combined or batched, are all measured."
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="None: CFG is left out."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Only decodes the pictures below the curve. Models that work in pixels "
                    "need none.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Only its size is used: what attention costs depends on it. None: the "
                    "family's usual size.",
                ),
                io.Combo.Input(
                    "preset",
                    options=["balanced", "fastest", "faithful", _OWN],
                    default="balanced",
                    tooltip="balanced: the least error that saves 60% of the time that blocks in "
                    "every layer and step save. faithful: 30%. fastest: every layer whose block "
                    "is faster, every step. own share: time_saved.",
                ),
                io.Float.Input(
                    "time_saved",
                    default=0.6,
                    min=0.05,
                    max=1.0,
                    step=0.01,
                    tooltip="For own share: how much of the time that blocks in every layer and "
                    "step save is to be saved.",
                ),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Guidance of the samplings that errors are measured on: take what you "
                    "draw with.",
                ),
                io.Int.Input(
                    "steps",
                    default=10,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="Of the sampling that errors are measured on. About three times as "
                    "many samplings are measured as there are layers.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    # Another seed would measure for minutes again, and choose otherwise.
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    advanced=True,
                    tooltip="Of the noise that errors are measured from.",
                ),
            ],
            outputs=[
                DeltaConv.Output(
                    display_name="deltaconv",
                    tooltip="The chosen layers alone, acting from the chosen step on.",
                ),
                Recipe.Output(display_name="recipe", tooltip="The same choice, to distill for it."),
                io.Image.Output(display_name="curve"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        deltaconv,
        positive,
        negative=None,
        vae=None,
        latent=None,
        preset: str = "balanced",
        time_saved: float = 0.6,
        cfg: float = 4.0,
        steps: int = 10,
        seed: int = 0,
    ) -> io.NodeOutput:
        # Imported here: distillation would slow down the start of ComfyUI.
        from ..deltaconv.distillation.choice_plot import choice_page
        from ..deltaconv.distillation.choice_report import choice_recipe, choice_report
        from ..deltaconv.pictures.convert import to_tensor
        from .host.choose import Request, choose_layers
        from .host.conditioning import conditions_of

        side = native_latent(find_sites(model).family)
        size = (side, side) if latent is None else tuple(latent["samples"].shape[-2:])
        with torch.inference_mode(False), torch.no_grad():
            conditions = conditions_of([positive])
            empty = conditions_of([negative]) if negative is not None else [None]
            if not conditions or not empty:
                name = "negative" if conditions else "positive"
                raise ValueError(
                    f"Expected conditioning in {name}, got an empty one. Connect an encoded prompt."
                )
            request = Request(
                conditions,
                empty[0],
                time_saved if preset == _OWN else preset,
                preset,
                size,
                cfg,
                steps,
                seed,
            )
            facts, sampled = choose_layers(model, deltaconv, request, _decoder(vae))
        chosen, report = facts.point, choice_report(facts)
        if not sampled:
            report += "\n\nNo pictures: connect a VAE that decodes this model's latents."
        page = choice_page(facts.measured, facts.named, facts.chosen, sampled)
        return io.NodeOutput(
            deltaconv.only(chosen.replaced, chosen.start),
            choice_recipe(facts, deltaconv.plans),
            to_tensor(page),
            report,
        )


def _decoder(vae):
    """latents [B, C, H, W] → pictures [B, H, W, 3]; None without a VAE for latents."""

    def decode(latents: torch.Tensor) -> torch.Tensor | None:
        if vae is not None:
            return decoded(vae, latents)
        if latents.shape[1] == 3:
            return ((latents + 1) / 2).clamp(0, 1).movedim(1, -1)
        return None

    return decode
