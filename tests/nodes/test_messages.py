"""What nodes show on themselves, in the page's language: complete, fitting, and as it is chosen."""

import ast
import json
import string

import pytest
from comfyui_deltaconv.deltaconv.messages import ENGLISH, english
from comfyui_deltaconv.development import ROOT
from comfyui_deltaconv.development.locales import LANGUAGES, MESSAGES


def read(language):
    return json.loads((ROOT / "locales" / language / MESSAGES).read_text(encoding="utf-8"))


def values_of(text):
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name)


def test_english_is_what_is_said():
    assert read("en") == ENGLISH, "python dev.py locales"


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_says_all_of_it_with_every_value(language):
    texts = read(language)
    assert list(texts) == list(ENGLISH)
    for key, text in ENGLISH.items():
        assert values_of(texts[key]) == values_of(text), key
        assert language == "en" or texts[key] != text or not text.strip("{} /MBa-z"), key


def test_every_sentence_is_said_somewhere():
    """Each key stands in a module as a whole, or begins with a word that one puts before it."""
    written = set()
    for folder in ("deltaconv", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "messages.py":
                tree = ast.parse(path.read_text(encoding="utf-8"))
                written |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    said = {f"{how} {what}" for how in ("interrupted", "failed") for what in WHERE}
    assert {key for key in ENGLISH if key not in written} == said
    assert {f" {what}" for what in WHERE} <= written


WHERE = ("before", "unsaved", "with samples", "initialized", "saved")


@pytest.fixture
def user(comfy, tmp_path, monkeypatch):
    """ComfyUI's folder of users."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    (tmp_path / "default").mkdir()
    return tmp_path / "default" / "comfy.settings.json"


@pytest.mark.any_comfyui
def test_a_node_speaks_the_language_that_was_chosen(user, monkeypatch):
    from comfyui_deltaconv.nodes import demo

    shown = []
    monkeypatch.setattr(demo, "show_on_node", shown.append)
    for language in ("en", "zh", "fr"):
        user.write_text(json.dumps({"Comfy.Locale": language}), encoding="utf-8")
        _, report = demo.DeltaConvDemoPrompt.execute("red apple").args
        assert shown[-1] == read(language)["prompt known"].format(count=2)
        # Reports are what people show each other.
        assert report == english("prompt known", count=2)


@pytest.mark.parametrize(
    "settings",
    [
        None,
        "",
        "[]",
        "{",
        '{"Comfy.Locale": 3}',
        '{"Comfy.Locale": "../en"}',
        '{"Comfy.Locale": "x"}',
    ],
)
def test_whatever_stands_in_the_settings_something_is_said(user, settings):
    from comfyui_deltaconv.nodes.host.messages import say

    if settings is not None:
        user.write_text(settings, encoding="utf-8")
    assert say("found", path="{a}") == "found {a}"


def test_several_users_of_one_server_read_english(user, monkeypatch):
    from comfy.cli_args import args
    from comfyui_deltaconv.nodes.host.messages import say

    user.write_text('{"Comfy.Locale": "fr"}', encoding="utf-8")
    assert say("prompt empty") == read("fr")["prompt empty"]
    monkeypatch.setattr(args, "multi_user", True)
    assert say("prompt empty") == ENGLISH["prompt empty"]
