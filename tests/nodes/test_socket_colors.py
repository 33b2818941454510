"""The pack's own sockets have colors in the real page, in either renderer."""

import pytest
from comfyui_deltaconv.development.comfyui.browser import in_page, open_page

COLORS = """
const style = getComputedStyle(document.documentElement);
return arguments[0].map(type => [
    app.canvas.default_connection_color_byType[type],
    LGraphCanvas.link_type_colors[type],
    style.getPropertyValue(`--color-datatype-${type}`),
]);
"""


def own_types(server):
    """Every socket type of the pack's nodes that is its own."""
    nodes = [node for name, node in server.object_info().items() if name.startswith("DeltaConv")]
    inputs = [
        entry[0] for node in nodes for part in node["input"].values() for entry in part.values()
    ]
    outputs = [kind for node in nodes for kind in node["output"]]
    return sorted({kind for kind in inputs + outputs if str(kind).startswith("DELTACONV")})


@pytest.mark.any_comfyui
def test_every_socket_of_our_own_has_a_color_of_its_own_in_every_palette(browser, server):
    types = own_types(server)
    assert "DELTACONV" in types and len(types) >= 4
    open_page(browser, server, Comfy_VueNodes_Enabled=False)
    for palette in ("light", "dark"):
        in_page(
            browser,
            "await app.extensionManager.setting.set('Comfy.ColorPalette', arguments[0])",
            palette,
        )
        colors = in_page(browser, COLORS, types)
        assert all(len(set(ways)) == 1 and ways[0] for ways in colors), (palette, colors)
        assert len({ways[0] for ways in colors}) == len(types)
