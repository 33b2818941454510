"""A walk through the real page as a new user takes it, with a picture of every station."""

import dataclasses
import json

import pytest
from comfyui_deltaconv.deltaconv import demo, read_weights, write_weights
from selenium.webdriver.common.keys import Keys
from small_distillation import DISTILL, SETTINGS, SMALL_RUN, small_distillation
from walking import LISTEN, Walk, pictures_folder, small_demo

CANVAS, NODES = "canvas", "Vue nodes"


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    folder = pictures_folder(tmp_path_factory)
    yield folder
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    reporter.write_line(f"\nPictures of the page: {folder}")


# The gate walks once, whichever ComfyUI is free; the long tier in both renderers on both.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(NODES, marks=pytest.mark.any_comfyui, id=f"once-{NODES}"),
        pytest.param(CANVAS, marks=pytest.mark.long),
        pytest.param(NODES, marks=pytest.mark.long),
    ],
)
def walk(request, browser, server, folder):
    return Walk(browser, server, request.param == NODES, folder)


def test_the_template_is_found_and_opens_without_a_red_node(walk):
    walk.begin()
    walk.command("Comfy.BrowseTemplates")
    walk.press_words("deltaconv", "[role=dialog]")
    walk.wait(lambda: "1 demo" in walk.text())
    walk.shot("templates")
    walk.press("[data-testid=template-workflow-1_demo]")
    walk.wait(lambda: walk.page("return app.graph.nodes.length") == 17)
    walk.wait(lambda: not walk.page("return !!document.querySelector('[role=dialog]')"))
    assert not walk.page("return app.graph.nodes.filter(node => node.has_errors).length")
    # In view without a move: the note that says what to do, and every text: below that the canvas
    # leaves them out.
    note = "const [x, y] = app.canvas.ds.convertOffsetToCanvas(find('What this shows').pos);"
    x, y, scale = walk.page(note + "return [x, y, app.canvas.ds.scale]")
    assert 0 < x < 1920 and 0 < y < 937 and scale > 0.56
    walk.shot("demo")


def test_a_dragged_workflow_runs_and_its_picture_brings_it_back(walk):
    walk.begin({"nodes": [], "links": [], "version": 0.4})
    walk.drop(json.dumps(small_demo()).encode(), "dragged.json", "application/json")
    walk.wait(lambda: walk.page("return app.graph.nodes.length") == 17)
    walk.write("red apple", "octopus, zebrafish")
    assert walk.run() == "success"
    steps = walk.page("return window.progress")
    assert [step[:2] for step in steps] == [[1, 3], [2, 3], [3, 3]] * 2
    assert any("%" in title for *_, title in steps)
    walk.wait(lambda: "ignored: zebrafish." in walk.text())
    assert "ignored: zebrafish." in walk.line("Prompt")
    walk.wait(lambda: walk.widget("What was replaced", "preview_text"))
    assert walk.widget("What was replaced", "preview_text").startswith("- 10 of 10")
    walk.wait(lambda: walk.page("return find('Side by side').imgs?.[0]?.naturalWidth > 500"))
    walk.shot("drawn")
    # A line of one node may come after the last node has run.
    walk.wait(lambda: "a step took" in walk.line("Apply ΔConv"))
    assert "10 of 10 self-attention layers replaced; computation" in walk.line("Apply ΔConv")
    walk.wait(lambda: "s with self-attention" in walk.line("ΔConv Demo Model"))
    assert walk.overlaps() == []
    teacher, student = walk.pixels("Teacher", "Student")
    assert len(teacher) == 4 * 32 * 32 and teacher != student

    (picture,) = (walk.page("return app.nodeOutputs[find('Side by side').id].images"))[:1]
    walk.begin({"nodes": [], "links": [], "version": 0.4})
    walk.drop(walk.server.view(picture), picture["filename"], "image/png")
    walk.wait(lambda: walk.page("return app.graph.nodes.length") == 17)
    assert walk.widget("Prompt", "text") == "octopus, zebrafish"


def test_bypassed_apply_gives_the_stock_picture(walk):
    walk.begin(small_demo())
    walk.select("Apply ΔConv")
    walk.keys(Keys.CONTROL, "b")
    walk.wait(lambda: walk.page("return find('Apply ΔConv').mode") == 4)
    assert walk.run() == "success"
    walk.wait(lambda: walk.widget("What was replaced", "preview_text"))
    walk.shot("bypassed")
    teacher, student = walk.pixels("Teacher", "Student")
    assert teacher == student and len(set(teacher)) > 9
    assert walk.widget("What was replaced", "preview_text").startswith("No layer is replaced")


def test_the_info_panel_shows_the_help_page_with_its_picture(walk):
    walk.begin(small_demo())
    walk.select("Apply ΔConv")
    walk.press("[data-testid=info-button]")
    walk.wait(lambda: "Bypass or remove the node and the model is what it was" in walk.text())
    image = "return [...document.querySelectorAll('.node-help-content img')].map(each =>"
    image += " [each.naturalWidth, each.width, each.parentElement.clientWidth])"
    walk.wait(lambda: all(loaded for loaded, *_ in walk.page(image)))
    walk.shot("help")
    pictures = walk.page(image)
    assert pictures and all(width <= room for _, width, room in pictures)


def test_the_nodes_speak_the_language_of_the_page(walk):
    walk.begin()

    def called():
        # The front end of ComfyUI 0.30.0 names nodes anew only where the page is loaded again.
        walk.browser.settings = None
        walk.begin(small_demo())
        return walk.page("return LiteGraph.createNode('DeltaConvApply').title")

    walk.page("await app.extensionManager.setting.set('Comfy.Locale', 'fr')")
    try:
        walk.wait(lambda: "Exécuter" in walk.text())
        assert called() == "Appliquer ΔConv"
        walk.shot("french")
    finally:
        walk.page("await app.extensionManager.setting.set('Comfy.Locale', 'en')")
    assert called() == "Apply ΔConv"


def test_the_demo_runs_as_an_app(walk):
    """The page's app mode: the prompt as a form, the pictures below, no graph."""
    walk.begin(small_demo())
    walk.command("Comfy.ToggleLinear")
    walk.write("red apple", "cat face")
    walk.page(LISTEN)
    walk.press_words("Run", "[data-testid=linear-run-button]")
    assert walk.ended() == "success"
    shown = "return [...document.querySelectorAll('img')].map(each => [each.src, each.width])"
    walk.wait(lambda: any("demo_" in src and width > 500 for src, width in walk.page(shown)))
    assert "start_percent" in walk.text()
    walk.shot("app")
    walk.command("Comfy.ToggleLinear")
    assert walk.widget("Prompt", "text") == "cat face"


@pytest.fixture(scope="module")
def files(server):
    """Files of weights as users have them: good, cut short, and of another family."""
    folder = server.base / "models" / "deltaconv"
    (folder / "broken.safetensors").write_bytes(demo.DELTACONV_PATH.read_bytes()[:-1000])
    (folder / "mended.safetensors").write_bytes(demo.DELTACONV_PATH.read_bytes())
    other = dataclasses.replace(read_weights(demo.DELTACONV_PATH), family="sdxl")
    write_weights(other, folder / "other.safetensors")
    yield
    for name in ("broken", "mended", "other"):
        (folder / f"{name}.safetensors").unlink()


MISSING = "none: put one into models/deltaconv"


@pytest.mark.parametrize(
    ("file", "node", "words"),
    [
        (MISSING, "DeltaConvLoad", "got no choice of one. Put the .safetensors file there"),
        ("gone.safetensors", "DeltaConvLoad", "got 'gone.safetensors', which is not there."),
        ("broken.safetensors", "DeltaConvLoad", "or was cut short: get it again."),
        ("other.safetensors", "DeltaConvApply", "for Stable Diffusion XL. Load the file that was"),
    ],
    ids=["missing", "gone", "broken", "another family"],
)
@pytest.mark.usefixtures("files")
def test_weights_that_cannot_be_used_say_why(walk, file, node, words):
    nodes = [
        {"type": "DeltaConvDemoModel", "pos": [60, 100], "size": [320, 100]},
        {"type": "DeltaConvLoad", "pos": [60, 300], "size": [400, 260], "widgets_values": [file]},
        {"type": "DeltaConvApply", "pos": [520, 100], "size": [400, 360]},
        {"type": "PreviewAny", "pos": [980, 100], "size": [300, 200]},
    ]
    workflow = {"nodes": [each | {"id": n} for n, each in enumerate(nodes, 1)], "links": []}
    walk.begin(workflow | {"version": 0.4})
    walk.page(
        "const apply = find('DeltaConvApply'); find('DeltaConvDemoModel').connect(0, apply, 0);"
        "find('DeltaConvLoad').connect(0, apply, 1); apply.connect(1, find('PreviewAny'), 0);"
    )
    walk.start()
    walk.wait(lambda: words in walk.line(node))
    walk.wait(lambda: words in walk.text())
    walk.shot(f"refused-{file.partition('.')[0].partition(':')[0]}")


@pytest.mark.usefixtures("files")
def test_a_refusal_leaves_the_node_once_it_is_mended(walk):
    nodes = [{"id": 1, "type": "DeltaConvLoad", "pos": [300, 300], "widgets_values": [MISSING]}]
    nodes[0] |= {"outputs": [{"name": "deltaconv", "type": "DELTACONV", "links": [1]}]}
    nodes.append({"id": 2, "type": "PreviewAny", "pos": [800, 300]})
    nodes[1] |= {"inputs": [{"name": "source", "type": "*", "link": 1}], "size": [300, 200]}
    walk.begin({"nodes": nodes, "links": [[1, 1, 0, 2, 0, "*"]], "version": 0.4})
    walk.start()
    walk.wait(lambda: "got no choice of one" in walk.line("DeltaConvLoad"))
    walk.page("find('DeltaConvLoad').widgets[0].value = 'mended.safetensors'")
    assert walk.run() == "success"
    assert walk.line("DeltaConvLoad") == ""


def test_apply_without_connections_names_them(walk):
    nodes = [{"id": 1, "type": "DeltaConvApply", "pos": [300, 300], "size": [320, 300]}]
    nodes.append({"id": 2, "type": "PreviewAny", "pos": [800, 300], "size": [300, 200]})
    walk.begin({"nodes": nodes, "links": [], "version": 0.4})
    walk.page("find('DeltaConvApply').connect(1, find('PreviewAny'), 0)")
    walk.start()
    words = "Expected model and deltaconv to be connected, got nothing."
    walk.wait(lambda: words in walk.line("DeltaConvApply"))
    walk.wait(lambda: words in walk.text())
    walk.shot("unconnected")


def test_a_distillation_is_interrupted_and_goes_on(walk):
    walk.begin(small_distillation())
    walk.page(
        f"""const node = find('{DISTILL}'), settings = LiteGraph.createNode('{SETTINGS}');
        app.graph.add(settings);
        settings.pos = [node.pos[0] - 480, node.pos[1] + 300];
        settings.connect(0, node, node.inputs.findIndex(input => input.name === 'settings'));"""
    )

    def given(**values):
        walk.page(
            f"""for (const each of [...find('{DISTILL}').widgets, ...find('{SETTINGS}').widgets])
                if (each.name in arguments[0]) each.value = arguments[0][each.name];""",
            values,
        )

    # No prompts: it says so before anything runs.
    given(**{**SMALL_RUN, "prompts": ""})
    assert walk.run() == "error"
    assert walk.line(DISTILL).startswith("Expected prompts to train with, got none.")
    walk.shot("no-prompts")

    given(**SMALL_RUN)
    walk.start()
    walk.wait(lambda: "layers " in walk.line(DISTILL))
    folder = walk.line(DISTILL).partition(", folder ")[2]
    walk.shot("distilling")
    walk.press("[aria-label='Cancel current run']")
    assert walk.ended() == "interrupted"
    said = walk.wait(lambda: "interrupted at layers " in (line := walk.line(DISTILL)) and line)
    assert f"To go on, queue again with folder {folder}" in said and "saved after" in said
    walk.wait(lambda: f"queue again with folder {folder}" in walk.text())
    walk.shot("interrupted")
    saved = int(said.partition("saved after ")[2].split()[0])

    given(folder=folder, layer_steps=saved + 2)
    assert walk.run() == "success"
    assert f"layers {saved + 2}/{saved + 2}" in walk.line(DISTILL)
    walk.shot("gone-on")
