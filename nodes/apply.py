"""Apply ΔConv weights to a MODEL."""

from comfy_api.latest import io

from ..deltaconv.application.report import ApplicationFacts, application_report, application_summary
from ..deltaconv.weights.compatibility import check_fit, select_sites
from ..kernels import GATES
from .host.application import NODE, Application
from .host.inert import inert_parts
from .host.messages import say
from .host.node_text import running_node, show_on_node
from .host.patch import attach, choose_ways, compute_dtype, is_patched, load_blocks
from .host.sites import find_sites
from .node import Node
from .sockets import CATEGORY, DeltaConv

_OWN_GATE = "from the weights"
_ALWAYS, _WHERE_FASTER = "always", "where faster"


class DeltaConvApply(Node):
    """MODEL and DELTACONV → MODEL with ΔConvBlocks in place of self-attention, and a report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Apply ΔConv",
            category=CATEGORY,
            description="Replace the self-attention layers of a model by the ΔConvBlocks "
            "distilled from them. Bypass or remove the node and the model is what it was, bit "
            "for bit.",
            search_aliases=["ConvFusion", "replace self-attention", "faster sampling"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="SD1.x, SD2.x, SDXL, PixArt, Anima, Cosmos-Predict2, HunyuanDiT, Wan, "
                    "Kandinsky 5 or LTX-Video; it is not changed, a patched one comes out.",
                ),
                DeltaConv.Input(
                    "deltaconv",
                    tooltip="From Load ΔConv Weights, ΔConv Demo Model or Distill ΔConv.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where in sampling the blocks begin to act; plain attention runs "
                    "before. Weights can bring a start of their own: the later one counts.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where in sampling the blocks stop acting; plain attention runs after.",
                ),
                io.String.Input(
                    "sites",
                    default="all",
                    advanced=True,
                    tooltip="Which layers to replace, separated by commas: all, level 0 (the "
                    "highest resolution), level 1 …, down, middle, up, or a path with wildcards "
                    "such as output_blocks.*; a leading - leaves out.",
                ),
                io.Combo.Input(
                    "gate",
                    options=[_OWN_GATE, *GATES],
                    default=_OWN_GATE,
                    advanced=True,
                    tooltip="The gate that the blocks were trained with. Only for files that do "
                    "not say it and whose family usually has the other one.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Only its size is used: the report counts the computation for it "
                    "rather than for the family's usual size.",
                ),
                io.Combo.Input(
                    "when",
                    options=[_ALWAYS, _WHERE_FASTER],
                    default=_ALWAYS,
                    optional=True,
                    tooltip="where faster: every layer is timed once at its size on this device, "
                    "and plain attention stays where it wins. With a latent connected the report "
                    "says where; otherwise the log does, after the first sampling.",
                ),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="report")],
        )

    @classmethod
    def validate_inputs(
        cls, start_percent: float | None = None, end_percent: float | None = None
    ) -> bool | str:
        # What comes over a link is not known yet.
        if start_percent is None or end_percent is None:
            return True
        return _percent_problem(start_percent, end_percent) or True

    @classmethod
    def execute(
        cls,
        model,
        deltaconv,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        sites: str = "all",
        gate: str = _OWN_GATE,
        latent=None,
        when: str = _ALWAYS,
    ) -> io.NodeOutput:
        if problem := _percent_problem(start_percent, end_percent):
            raise ValueError(problem)
        if deltaconv.start >= end_percent:
            raise ValueError(
                f"Expected end_percent above {deltaconv.start:g}, from where on these weights act, "
                f"got {end_percent=}: the blocks would never act."
            )
        start_percent = max(start_percent, deltaconv.start)
        gate = deltaconv.gate if gate == _OWN_GATE else gate
        model_sites = find_sites(model)
        check_fit(deltaconv, model_sites.dims, model_sites.family)
        selected = select_sites(model_sites.levels, sites)
        replaced = tuple(site for site in selected if site in deltaconv.sites)
        if not replaced:
            raise ValueError(
                f"Expected blocks for the layers chosen by {sites!r}, got weights for "
                f"{len(deltaconv.sites)} layers and none of these. Choose sites that they have."
            )
        always = (start_percent, end_percent) == (0.0, 1.0)
        application = Application(
            model_sites,
            replaced,
            None if always else (start_percent, end_percent),
            where_faster=when == _WHERE_FASTER,
            tells_times=True,
        )
        blocks = load_blocks(deltaconv, replaced, gate, compute_dtype(model))
        patched = attach(model, blocks, application)
        size = None if latent is None else tuple(latent["samples"].shape[-2:])
        if application.where_faster and size:
            # Guidance runs the positive and the negative prompt in one batch.
            choose_ways(patched, application, 2 * latent["samples"].shape[0], size)
        facts = ApplicationFacts(
            weights=deltaconv,
            family=model_sites.family,
            dims=model_sites.dims,
            attention_parameters={
                path: site.parameters for path, site in model_sites.sites.items()
            },
            selected=tuple(selected),
            replaced=replaced,
            gate=gate,
            percent_range=application.percent_range,
            latent_size=size,
            map_size=model_sites.map_size,
            earlier=is_patched(model),
            inert=tuple(inert_parts(patched, model_sites, replaced).values()),
            where_faster=application.where_faster,
            chosen=application.chosen,
        )
        application.node, application.summary = running_node(), application_summary(facts, say)
        show_on_node(application.summary)
        return io.NodeOutput(patched, application_report(facts))


def _percent_problem(start: float, end: float) -> str:
    """Why blocks cannot act from `start` to `end`; "" where they can."""
    if not (0 <= start <= 1 and 0 <= end <= 1):
        return f"Expected percents from 0 to 1, got start_percent={start} and end_percent={end}."
    if start >= end:
        return (
            f"Expected start_percent below end_percent, got start_percent={start} and "
            f"end_percent={end}: the blocks would never act."
        )
    return ""
