"""Lines that come while another node draws stand on the node that said them, in today's graph."""

import json
import struct

import pytest
import websocket

TEXT = 3


def graph(ids: dict[str, str], seed: int) -> dict:
    """The demo, stock and with blocks, in API format: name of a node → its id in `ids`."""

    def at(name, output=0):
        return [ids[name], output]

    def drawing(model):
        sampler = {"seed": seed, "steps": 3, "cfg": 4.0, "sampler_name": "euler"}
        sampler |= {"scheduler": "karras", "denoise": 1.0, "latent_image": at("latent")}
        return sampler | {"model": model, "positive": at("prompt"), "negative": at("prompt")}

    size = {"width": 32, "height": 32, "batch_size": 1}
    both = {"model": at("demo"), "deltaconv": at("demo", 1)}
    percents = {"start_percent": 0.0, "end_percent": 1.0, "sites": "all"}
    nodes = {
        "demo": ("DeltaConvDemoModel", {}),
        "prompt": ("DeltaConvDemoPrompt", {"text": "red apple"}),
        "latent": ("EmptyChromaRadianceLatentImage", size),
        "apply": ("DeltaConvApply", {**both, **percents, "gate": "from the weights"}),
        "stock": ("KSampler", drawing(at("demo"))),
        "blocks": ("KSampler", drawing(at("apply"))),
        "vae": ("VAELoader", {"vae_name": "pixel_space"}),
    }
    for name in ("stock", "blocks"):
        nodes[f"{name} decoded"] = ("VAEDecode", {"samples": at(name), "vae": at("vae")})
        nodes[f"{name} seen"] = ("PreviewImage", {"images": at(f"{name} decoded")})
    return {ids[name]: {"class_type": kind, "inputs": i} for name, (kind, i) in nodes.items()}


NAMES = ("demo", "prompt", "latent", "apply", "stock", "blocks", "vae")
NAMES += ("stock decoded", "stock seen", "blocks decoded", "blocks seen")


def lines(server, prompt) -> dict[str, list[str]]:
    """Node → lines that the page would show on it, in a run to its end."""
    found: dict[str, list[str]] = {}
    address = f"ws://{server.address}/ws?clientId={server.client_id}"
    connection = websocket.create_connection(address, timeout=300)
    try:
        prompt_id = server.submit(prompt)
        while True:
            message = connection.recv()
            if isinstance(message, bytes):
                kind, size = struct.unpack(">II", message[:8])
                if kind == TEXT:
                    node = message[8 : 8 + size].decode()
                    found.setdefault(node, []).append(message[8 + size :].decode())
                continue
            content = json.loads(message)
            detail = content["data"]
            if detail.get("prompt_id") == prompt_id:
                assert content["type"] != "execution_error", detail
                if content["type"] == "executing" and detail["node"] is None:
                    return found
    finally:
        connection.close()


@pytest.mark.parametrize("moved", ["to new numbers", "to each other's"])
def test_what_is_kept_from_another_graph_speaks_in_this_one(server, moved):
    """ComfyUI keeps what a node gave for one of the same inputs, whatever its number."""
    ids = {name: str(number) for number, name in enumerate(NAMES, 1)}
    seed = 10 * (1 + len(moved))
    said = lines(server, graph(ids, seed))
    assert any("s with self-attention" in line for line in said[ids["demo"]])
    assert any("a step took" in line for line in said[ids["apply"]])

    names = NAMES[::-1] if moved == "to each other's" else NAMES
    first = 1 if moved == "to each other's" else 101
    ids = {name: str(number) for number, name in enumerate(names, first)}
    said = lines(server, graph(ids, seed + 1))
    talking = {node for node, each in said.items() if "a step took" in " ".join(each)}
    assert talking == {ids["demo"], ids["apply"]}


def test_of_two_that_may_have_said_it_none_is_chosen(server):
    """Without its number in the graph, and with two of its class, nobody knows whose it is."""
    ids = {name: str(number) for number, name in enumerate(NAMES, 1)}
    lines(server, graph(ids, 71))
    moved = {name: str(number) for number, name in enumerate(NAMES, 201)}
    prompt = graph(moved, 72)
    other = {**moved, "apply": "301", "blocks": "302"}
    other |= {"blocks decoded": "303", "blocks seen": "304"}
    more = graph(other, 73)
    more["301"]["inputs"]["sites"] = "level 0"
    prompt |= {node: more[node] for node in ("301", "302", "303", "304")}
    said = lines(server, prompt)
    assert not any("a step took" in line for line in said.get(moved["apply"], []))
    assert any("a step took" in line for line in said["301"])
