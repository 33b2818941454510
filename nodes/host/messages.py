"""The sentences that nodes show on themselves, in the language of ComfyUI's page."""

import json
from functools import cache
from pathlib import Path

import folder_paths
from comfy.cli_args import args

from ...deltaconv.messages import english

_LOCALES = Path(__file__).parents[2] / "locales"


def say(key: str, **values: object) -> str:
    """The sentence `key` of `deltaconv.messages` with its `values`, in the page's language."""
    text = _texts(_language()).get(key)
    return text.format(**values) if text else english(key, **values)


def _language() -> str:
    """What the user chose in the page's settings; English where several users share the server.

    The page tells its server of a language that was chosen, not of one that the browser asks for.
    """
    if args.multi_user:
        return "en"
    settings = Path(folder_paths.get_user_directory(), "default", "comfy.settings.json")
    try:
        chosen = json.loads(settings.read_text(encoding="utf-8")).get("Comfy.Locale")
    except (OSError, ValueError, AttributeError):
        return "en"
    return chosen if isinstance(chosen, str) and chosen.isalpha() else "en"


@cache
def _texts(language: str) -> dict[str, str]:
    try:
        return json.loads((_LOCALES / language / "messages.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
