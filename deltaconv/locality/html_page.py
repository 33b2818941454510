"""The locality report as one HTML page with its pictures and data embedded."""

import base64
import html
import io

from ..families import family_title
from ..pictures.figure import PlotsUnavailable
from .model_plots import plot_model
from .report import LocalityReport
from .site_plots import plot_points, plot_profiles
from .text import report_text, verdict

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
figure { margin: 2rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #444; max-width: 60rem; }
pre { overflow-x: auto; background: #f5f5f5; padding: 1rem; font-size: 13px; line-height: 1.35; }
"""


def report_html(report: LocalityReport) -> str:
    """The report as one page; without matplotlib a sentence says so in place of the pictures."""
    title = html.escape(f"Self-attention of {family_title(report.family)}")
    try:
        figures = "".join(_figure(*entry) for entry in _figures(report))
    except PlotsUnavailable as error:
        figures = f"<p>{html.escape(str(error))}</p>"
    # "</script" would end the element, and "<!--<script" keep it from ending.
    data = report.to_json().replace("<", "\\u003c")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>'
        f"\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"<p>{html.escape(verdict(report))}</p>\n{figures}\n<h2>Table</h2>\n"
        f"<pre>{html.escape(report_text(report))}</pre>\n"
        f'<script type="application/json" id="report">{data}</script>\n</body>\n</html>\n'
    )


def _figures(report: LocalityReport):
    yield plot_model(report), "One row per layer, in the order in which the network runs them."
    yield plot_profiles(report), "Attention against distance, measured and fitted."
    for index in range(len(report.percents)):
        if report.maps:
            yield plot_points(report, index), "What single points of the picture look at."


def _figure(figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>\n"
    )
