"""The pack's own socket types."""

from comfy_api.latest import io

# Carries a `deltaconv.DeltaConvWeights`.
DeltaConv = io.Custom("DELTACONV")
# Carries a `deltaconv.locality.report.LocalityReport`.
Locality = io.Custom("DELTACONV_LOCALITY")
# Carries a `deltaconv.locality.recipe.Recipe`.
Recipe = io.Custom("DELTACONV_RECIPE")
# Carries a `host.distill_options.DistillOptions`.
DistillSettings = io.Custom("DELTACONV_DISTILL_SETTINGS")
# Core's: {"loss": [one per step]}.
LossMap = io.Custom("LOSS_MAP")

CATEGORY = "ΔConv"
