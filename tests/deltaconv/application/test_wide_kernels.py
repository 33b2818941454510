"""Kernels beyond the fast ones: they are read and run, and the report of Apply says so."""

import pytest
from comfyui_deltaconv.deltaconv import DeltaConvBlock, read_weights, write_weights
from comfyui_deltaconv.deltaconv.application.report import ApplicationFacts, application_report
from comfyui_deltaconv.deltaconv.weights.model import weights_of_blocks


def report(weights):
    sites = tuple(weights.sites)
    return application_report(
        ApplicationFacts(
            weights=weights,
            family="tiny",
            dims=weights.dims,
            attention_parameters=dict.fromkeys(sites, 256),
            selected=sites,
            replaced=sites,
            gate=weights.gate,
            percent_range=None,
            latent_size=None,
            map_size=lambda site, height, width: (height, width),
            earlier=False,
            inert="",
        )
    )


@pytest.mark.parametrize(("kernel", "wide"), [(15, False), (17, False), (19, True), (255, True)])
def test_the_report_says_which_blocks_the_fast_kernels_cannot_run(tmp_path, kernel, wide):
    blocks = {"blocks.0.attn": DeltaConvBlock(4, 3), "blocks.1.attn": DeltaConvBlock(4, kernel)}
    weights = weights_of_blocks(blocks, family="tiny")
    said = report(read_weights(write_weights(weights, tmp_path / "wide.safetensors")))
    sentence = "1 of 2 blocks have kernels wider than 17"
    assert (sentence in said) == wide and ("slower" in said) == wide
