"""Measure the locality of self-attention, and save the report."""

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..deltaconv.locality.settings import SENSITIVITIES, LocalityPlan, parse_percents, parse_points
from ..deltaconv.whole_file import write_whole
from .host.folders import output_folder
from .node import Node
from .sockets import CATEGORY, DeltaConv, Locality


class DeltaConvLocality(Node):
    """MODEL and prompt → where its self-attention looks: report, table, pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvLocality",
            display_name="Locality of Self-Attention",
            category=CATEGORY,
            description="Measure where the self-attention of a model looks, layer by layer: how "
            "much of it stays near, how evenly it spreads, how it falls off with distance, and "
            "what it would cost to cut it to a window or to replace it. The model's output is not "
            "changed.",
            search_aliases=["attention map", "attention visualization", "receptive field"],
            # An output node's view is filled again when its cached result is used.
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="What is measured; its output does not change."),
                io.Conditioning.Input("positive", tooltip="The prompt to measure with."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Pictures to add noise to. Without it, or with an empty latent, the "
                    "model's own samples of the prompt are measured; an empty latent sets size.",
                ),
                io.String.Input(
                    "percents",
                    default="0.2, 0.5, 0.8",
                    tooltip="When in sampling to measure: 0 is the noisiest step, 1 the last.",
                ),
                io.String.Input(
                    "points",
                    default="0.5, 0.5\n0.3, 0.25",
                    multiline=True,
                    tooltip="Query points whose attention is drawn over the picture, one a line: "
                    "x, y from 0 to 1, from the top left.",
                ),
                io.Combo.Input(
                    "sensitivity",
                    options=list(SENSITIVITIES),
                    default="off",
                    tooltip="Also measure what changing each layer alone does to the predicted "
                    "noise: cut to a window, replaced by its ΔConvBlock, or both. One model call "
                    "per layer, change and percent.",
                ),
                DeltaConv.Input(
                    "deltaconv",
                    optional=True,
                    tooltip="The ΔConv weights whose cost is measured, layer by layer.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    # Tables of two runs can be compared.
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the noise.",
                ),
                io.Float.Input(
                    "field_share",
                    default=0.6,
                    min=0.05,
                    max=0.95,
                    step=0.05,
                    advanced=True,
                    tooltip="A layer's receptive field is the smallest window with this share of "
                    "its attention above the constant part.",
                ),
                io.Int.Input(
                    "window",
                    default=0,
                    min=0,
                    max=255,
                    advanced=True,
                    tooltip="Odd window for the sensitivity, in latent cells of each layer; 0 "
                    "takes each layer's recommended kernel.",
                ),
                io.Int.Input(
                    "queries",
                    default=0,
                    min=0,
                    max=1 << 20,
                    advanced=True,
                    tooltip="0 counts every query. A number measures a random sample of that many "
                    "per layer, faster; the table then states the standard error.",
                ),
            ],
            outputs=[
                Locality.Output(display_name="report"),
                io.String.Output(display_name="table"),
                io.Image.Output(display_name="model_page"),
                io.Image.Output(display_name="profiles"),
                io.Image.Output(display_name="points"),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        latent=None,
        percents: str = "0.2, 0.5, 0.8",
        points: str = "",
        sensitivity: str = "off",
        deltaconv=None,
        seed: int = 0,
        field_share: float = 0.6,
        window: int = 0,
        queries: int = 0,
    ) -> io.NodeOutput:
        # Imported here: plots and pages would slow down the start of ComfyUI.
        from ..deltaconv.locality.model_plots import plot_model
        from ..deltaconv.locality.site_plots import plot_every_step, plot_profiles
        from ..deltaconv.locality.text import report_text
        from ..deltaconv.pictures.figure import picture
        from .host.locality_view import view_message

        plan = LocalityPlan(
            parse_percents(percents),
            parse_points(points),
            queries or None,
            field_share,
            sensitivity,
            window or None,
            seed,
        )
        # Imported here: it imports ComfyUI's samplers, and with them scipy.
        from .host.locality import measure_locality

        samples = None if latent is None else latent["samples"]
        report = measure_locality(model, positive, samples, plan, deltaconv)
        middle = len(report.percents) // 2
        return io.NodeOutput(
            report,
            report_text(report),
            picture(lambda: plot_model(report)),
            picture(lambda: plot_profiles(report)),
            plot_every_step(report),
            ui=view_message(report.pictures[middle], report.grid, report.percents[middle]),
        )


class DeltaConvSaveLocality(Node):
    """Report → one JSON file and one HTML page in output/deltaconv."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DeltaConvSaveLocality",
            display_name="Save Locality Report",
            category=CATEGORY,
            description="Save a locality report to output/deltaconv: as JSON with every figure, "
            "and as one HTML page with table and pictures; numbered, never overwriting.",
            search_aliases=["save attention report"],
            is_output_node=True,
            inputs=[
                Locality.Input("report", tooltip="From Locality of Self-Attention."),
                io.String.Input(
                    "filename_prefix",
                    default="locality",
                    tooltip="Start of the file names below output/deltaconv.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="json_file"),
                io.String.Output(display_name="html_file"),
            ],
        )

    @classmethod
    def execute(cls, report, filename_prefix: str) -> io.NodeOutput:
        from ..deltaconv.locality.html_page import report_html

        base = output_folder()
        os.makedirs(base, exist_ok=True)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, base
        )
        data, page = report.to_json().encode(), report_html(report).encode()
        while True:
            json_file, html_file = (
                Path(folder, f"{name}_{counter:05}_.{extension}") for extension in ("json", "html")
            )
            try:
                write_whole(json_file, data, overwrite=False)
            except FileExistsError:
                # Another ComfyUI took the number meanwhile.
                counter += 1
                continue
            try:
                write_whole(html_file, page, overwrite=False)
                break
            except FileExistsError:
                json_file.unlink()
                counter += 1
            except OSError:
                json_file.unlink()
                raise
        names = [os.path.join(subfolder, file.name) for file in (json_file, html_file)]
        return io.NodeOutput(*names)
