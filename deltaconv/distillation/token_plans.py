"""Which layers can begin pooled tokens, and the blocks that have some everywhere."""

from collections.abc import Mapping
from dataclasses import replace

from ..geometry import BlockPlan
from .settings import DistillationError
from .teacher import Teacher

# Beside tokens larger kernels and a second scale bring the demo model's layers 3% by least squares,
# and take longer than the tokens do (docs/measurements.md).
TOKEN_PLAN = BlockPlan(5, (1.0,))


def plans_with_tokens(teacher: Teacher) -> dict[str, BlockPlan]:
    """Every site of the teacher: pooled tokens with the layer's own heads, and small kernels.

    Raises DistillationError where a layer's scores are not of linear maps alone.
    """
    plans = {}
    for site in teacher.dims:
        heads = teacher.token_heads(site)
        if not heads:
            raise _none_to_begin(site)
        plans[site] = replace(TOKEN_PLAN, heads=heads)
    return plans


def check_tokens(teacher: Teacher, plans: Mapping[str, BlockPlan]) -> None:
    """Raise DistillationError for pooled tokens that the layer at their site cannot begin."""
    for site, plan in plans.items():
        heads = teacher.token_heads(site)
        if plan.heads and not heads:
            raise _none_to_begin(site)
        if plan.heads not in (0, heads):
            raise DistillationError(
                f"Expected pooled tokens with the {heads} heads of the layer at {site}, got "
                f"{plan.heads}. Change the recipe, or begin at random."
            )


def _none_to_begin(site: str) -> DistillationError:
    return DistillationError(
        "Expected layers whose queries and keys are linear in the map for pooled tokens, as those "
        f"of SD1.x, SD2.x and SDXL are, got another at {site}. Leave the tokens out."
    )
