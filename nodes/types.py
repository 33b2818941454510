"""The pack's own socket types."""

from comfy_api.latest import io

# Carries a `deltaconv.DeltaConvWeights`.
DeltaConv = io.Custom("DELTACONV")

CATEGORY = "model/patch/deltaconv"
