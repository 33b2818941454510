"""Node texts in all languages: complete, of the present texts, and what the page gets."""

import json
import re

import pytest
from comfyui_deltaconv.development import ROOT
from comfyui_deltaconv.development.locales import FILE, LANGUAGES, MESSAGES, node_texts
from selenium.webdriver.support.ui import WebDriverWait

LOCALES = ROOT / "locales"
OTHERS = [language for language in LANGUAGES if language != "en"]
# What is the same in every language: figures, files, formulas, options and proper names.
KEPT = re.compile(
    r"\d+(?:\.\d+)?|[\w%./*-]*(?:/|\.)[\w%*-]+|ΔConv(?:Block)?|\b(?:SD1|SD2|SDXL|PixArt|Anima|"
    r"balanced|faithful|fastest|informed|LPIPS|CLIP|PSNR|CFG|"
    r"LoRA|Min-SNR|bitsandbytes|Triton)\b"
)


def read(language):
    return json.loads((LOCALES / language / FILE).read_text(encoding="utf-8"))


def leaves(texts, path=()):
    """(path, text) of every text, depth first."""
    for name, value in texts.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


@pytest.mark.any_comfyui
@pytest.mark.usefixtures("comfy")
def test_english_is_what_the_nodes_say():
    assert read("en") == node_texts(), "python dev.py locales"


def test_every_language_is_there():
    assert {path.name for path in LOCALES.iterdir()} == set(LANGUAGES)


@pytest.mark.parametrize("language", OTHERS)
def test_a_language_has_every_text_and_no_other(language):
    english, translated = dict(leaves(read("en"))), dict(leaves(read(language)))
    assert list(translated) == list(english)
    assert all(isinstance(text, str) and text.strip() for text in translated.values())
    # Sentences, and names of more than one word.
    same = [
        path
        for path, text in english.items()
        if " " in text and "name" not in path[-1:] and translated[path] == text
    ]
    assert not same


@pytest.mark.parametrize("language", OTHERS)
def test_a_language_keeps_figures_files_and_options(language):
    english, translated = dict(leaves(read("en"))), dict(leaves(read(language)))
    lost = {}
    for path, text in english.items():
        if path[-1] == "name":
            continue
        # French and Spanish write a comma, and all may repeat what they name.
        found = translated[path].replace(",", ".")
        missing = {part for part in KEPT.findall(text.replace(",", ".")) if part not in found}
        if missing:
            lost[path] = missing
    assert not lost


@pytest.mark.parametrize("language", OTHERS)
def test_nodes_are_named_in_texts_as_they_are_called(language):
    """A text that names another node names it by its translated title."""
    english, translated = read("en"), read(language)
    titles = {node: texts["display_name"] for node, texts in english.items()}
    wrong = []
    for path, text in leaves(english):
        if path[-1] == "display_name":
            continue
        there = translated
        for part in path:
            there = there[part]
        for node, title in titles.items():
            longer = [other for other in titles.values() if title in other and other != title]
            if title in text and not any(other in text for other in longer):
                if translated[node]["display_name"] not in there:
                    wrong.append((path, title))
    assert not wrong


@pytest.mark.any_comfyui
def test_the_server_gives_them_to_the_page(server):
    served = server.get("/i18n")
    for language in LANGUAGES:
        theirs = served[language]["nodeDefs"]
        assert {name: theirs[name] for name in read(language)} == read(language)


@pytest.mark.any_comfyui
def test_the_page_shows_the_language_that_is_chosen(browser, server):
    from comfyui_deltaconv.development.comfyui.browser import in_page, open_page

    open_page(browser, server, Comfy_VueNodes_Enabled=False, Comfy_Locale="fr")
    title = in_page(browser, "return LiteGraph.createNode('DeltaConvApply').title")
    assert title == read("fr")["DeltaConvApply"]["display_name"]
    # Whatever a node says while it runs, too.
    in_page(browser, SAYS)
    said = WebDriverWait(browser, 60).until(lambda _: in_page(browser, SAID))
    messages = json.loads((LOCALES / "fr" / MESSAGES).read_text(encoding="utf-8"))
    assert said == messages["prompt known"].format(count=2)
    open_page(browser, server, Comfy_VueNodes_Enabled=False, Comfy_Locale="en")


SAYS = """
await app.loadGraphData({version: 0.4, nodes: [], links: []});
const make = type => LiteGraph.createNode(type);
const [prompt, preview] = ['DeltaConvDemoPrompt', 'PreviewAny'].map(make);
app.graph.add(prompt);
app.graph.add(preview);
prompt.connect(1, preview, 0);
await app.queuePrompt(0);
"""
SAID = """
const node = app.graph.nodes.find(node => node.type === 'DeltaConvDemoPrompt');
return node.widgets.find(widget => widget.name === '$$node-text-preview')?.value
"""
