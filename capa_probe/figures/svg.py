"""Figures as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure

from capa_probe.figures.style import FAINT, INK, QUIET, ROLES, RULE, TEXT, TITLE, TITLE_HEIGHT, VISUAL, styled

#: Custom property of CSS to the colour that stands where a page does not define it.
PROPERTIES: dict[str, str] = {
    "--ink": INK,
    "--quiet": QUIET,
    "--faint": FAINT,
    "--rule": RULE,
    "--paper": "#ffffff",
    "--visual": VISUAL,
    "--text-token": TEXT,
    **{f"--{role}": colour for role, (colour, _) in ROLES.items()},
}
#: Of the parts that are drawn as pixels.
_DPI = 144


@styled
def svg(figure: Figure, name: str, label: str) -> str:
    """A figure as an ``<svg>`` element for a page, its text as outlines, with nothing outside it referred to.

    Its title is left out, since the page has headings of its own.

    Every colour of the project's style is a custom property of CSS (see ``PROPERTIES``), so that one drawing serves
    light and dark pages.

    Args:
        figure: what one of the figure functions returned.
        name: starts every id, so that several figures can stand on a page; letters, digits and hyphens.
        label: what the figure shows, for those who cannot see it.
    """
    drawn = io.StringIO()
    titles = [text for text in figure.texts if text.get_gid() == TITLE]
    try:
        for title in titles:
            title.set_visible(False)
        with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
            figure.savefig(drawn, format="svg", dpi=_DPI, metadata={"Date": None, "Creator": None})
    finally:
        for title in titles:
            title.set_visible(True)
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    for custom, colour in PROPERTIES.items():
        text = re.sub(rf": {colour}\b", f": var({custom}, {colour})", text, flags=re.IGNORECASE)
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    # The page sets the size; the viewBox keeps the proportions.
    width, height = (float(inches) for inches in figure.get_size_inches())
    top = TITLE_HEIGHT if titles else 0.0
    view = f"0 {72 * top:g} {72 * width:g} {72 * (height - top):g}"
    body = re.sub(
        r"<style.*?</style>", "", text[text.index(">") + 1 :], flags=re.DOTALL
    )  # would style the page
    opening = (
        f'<svg role="img" aria-label="{escaped}" viewBox="{view}" style="--inches: {width:g}" '
        'stroke-linejoin="round" stroke-linecap="butt">'
    )
    return re.sub(r"\s*\n\s*", "\n", (opening + body).replace("xlink:href", "href")).strip()
