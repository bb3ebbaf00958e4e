"""A gallery as one HTML file: nothing is loaded from outside, and a word under the pointer shows its heat map."""

import base64
import hashlib
import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mmtransformer.plots import fonts
from mmtransformer.plots.cards import Card, CardCaption, show_number
from mmtransformer.plots.heatmap import as_heat, heat_top, palette
from mmtransformer.serialization.printable import markup
from mmtransformer.serialization.writing import write_whole

Number = float | int | str | None | tuple[float, float, float]
"""A figure; a text; None for "not computed"; or (value, low, high) with its confidence interval."""

CONTROLS = """<form class="controls" hidden>
<input type="search" placeholder="Search WHAT" aria-label="Search WHAT">
<select aria-label="Order">
<option value="">in their order</option><option value="worst">worst first</option>
<option value="best">best first</option>
</select>
<output></output>
</form>"""
"""To search and order the cards of a page; WHAT is what their texts are."""
CSS = Path(__file__).parent / "assets" / "page.css"
SCRIPT = Path(__file__).parent / "assets" / "page.js"


def save_html_gallery(
    cards: Sequence[Card],
    path: str | Path,
    *,
    title: str,
    metrics: Mapping[str, Number | Mapping[str, Number]] | None = None,
    hint: str = "",
    image_size: int = 448,
) -> Path:
    """Write cards and metrics as a self-contained HTML page.

    Pictures come first, figures after them. The page reads well without scripts, on a phone and in the dark; with
    scripts, a word that is pointed at, tapped, or reached with the arrow keys shows where the model looked, and the
    cards can be searched, and sorted by how good their captions are. Captions are strangers' text: they are escaped,
    and the page's own policy lets no script run but its own and nothing be fetched.

    Args:
        cards: the pictures with their captions; `CardCaption.heat` brings the heat maps.
        path: the .html file to write.
        title: the page's title.
        metrics: name -> figure, or name -> (column -> figure); None for no table.
        hint: a line above the figures; what stands between backticks is set as a command.
        image_size: pixels of a picture's longer side, at most.

    Returns:
        The path.
    """
    body = [f"<h1>{markup(title)}</h1>"]
    heated = any(said.heat is not None for card in cards for said in card.captions)
    if heated:
        text = "<b>Point at a word</b> (or tap it) to see where the model looked while it wrote it."
        body.append(f'<p class="hint">{text}</p>')
    body += [CONTROLS.replace("WHAT", "captions")] if len(cards) > 1 else []
    body += ["<main>", *(_card(card, image_size) for card in cards), "</main>"]
    if hint:
        line = re.sub("&#96;(.+?)&#96;", r"<code>\1</code>", markup(hint))
        body.append(f'<p class="hint">{line}</p>')
    if metrics:
        body.append(_table(metrics))
    return write_whole(path, whole_page(title, "\n".join(body), heated=heated))


def whole_page(title: str, content: str, *, heated: bool = False) -> bytes:
    """A page of its own: style, script, the Korean letters that it needs, and a policy that fetches nothing.

    Args:
        title: its title, a plain text.
        content: what stands in its body, as HTML; strangers' text in it is escaped (`escape`).
        heated: whether it has heat maps, whose colours the script then needs.
    """
    css = _korean_face(html.unescape(re.sub(r"<[^>]*>", " ", content))) + CSS.read_text(encoding="utf-8")
    script = SCRIPT.read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; img-src data:; font-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src 'unsafe-inline'; script-src 'sha256-{_digest(script)}'"
    )
    colours = f' data-palette="{base64.b64encode(palette().tobytes()).decode()}"' if heated else ""
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{markup(title)}</title>
<style>
{css}</style>
</head>
<body{colours}>
{content}
<script>{script}</script>
</body>
</html>
"""
    return page.encode("utf-8")


def _korean_face(told: str) -> str:
    """The rule that gives the page Korean letters: the reader's own font, else those that the text needs, embedded.

    The range keeps the face to Korean, so that it can stand first in the list of families: browsers do not always
    draw a text anew when a face further down has been decoded.
    """
    hangul = "".join(c for c in fonts.clean(told) if re.match("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]", c))
    if not hangul:
        return ""
    own = ", ".join(f'local("{name}")' for name in ("Apple SD Gothic Neo", "Malgun Gothic", "Noto Sans CJK KR"))
    data = base64.b64encode(fonts.subset(hangul)).decode()
    return (
        f'@font-face {{ font-family: "MMT Hangul"; src: {own}, url(data:font/woff;base64,{data}) format("woff"); '
        "unicode-range: U+1100-11FF, U+3130-318F, U+AC00-D7A3; }\n"
    )


def encode_image(image: Image.Image, longest: int) -> str:
    """Give a picture as a `data:` address: WebP, a small one lossless."""
    image = image.convert("RGB")
    if max(image.size) > longest:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    lossless = image.width * image.height <= 65_536
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=lossless, quality=80 if lossless else 82, method=4)
    data = file.getvalue()
    return "data:image/webp;base64," + base64.b64encode(data).decode()


def _card(card: Card, image_size: int) -> str:
    first = card.captions[0].text if card.captions else card.heading
    heading = f"<h2>{markup(card.heading)}</h2>" if card.heading else ""
    heat = "<canvas aria-hidden=true></canvas>" if any(s.heat is not None for s in card.captions) else ""
    wide, high = card.image.size
    rank = "" if card.rank is None else f' data-rank="{card.rank:.4f}"'
    return (
        f'<article{rank}>\n<div class="picture"><img loading="lazy" decoding="async" '
        f'src="{encode_image(card.image, image_size)}" width="{wide}" height="{high}" alt="{markup(first)}">{heat}'
        f"</div>\n"
        f'<div class="text">{heading}{"".join(_said(said) for said in card.captions)}</div>\n</article>'
    )


def _said(said: CardCaption) -> str:
    """A caption with its marks and references."""
    language = _language(said.language)
    chips = "".join(f'<li class="{kind}">{markup(text)}</li>' for text, kind in said.marks())
    marks = f'\n<ul class="chips">{chips}</ul>' if chips else ""
    items = "".join(f'<li dir="auto">{markup(r)}</li>' for r in said.references)
    references = f'\n<ul class="references"{language}>{items}</ul>' if items else ""
    return f"\n<section>{_words(said, language)}{marks}{references}</section>"


def _words(said: CardCaption, language: str) -> str:
    """The caption itself; with heat, every word in a span and the grids as bytes."""
    if said.heat is None or not said.words:
        return f'<p class="said" dir="auto"{language}>{markup(said.text) or "(empty)"}</p>'
    heat = as_heat(said.heat, len(said.words))
    level = np.round(np.clip(heat / heat_top(heat), 0, 1) * 255).astype(np.uint8)
    grid = " ".join([*map(str, heat.shape[1:]), *(f"{v:.4g}" for v in said.box)])
    spans = " ".join(f"<span>{markup(word)}</span>" for word in said.words)
    data = base64.b64encode(level.tobytes()).decode()
    return f'<p class="said heated" dir="auto"{language} data-grid="{grid}" data-heat="{data}">{spans}</p>'


def _table(metrics: Mapping[str, Number | Mapping[str, Number]]) -> str:
    columns: dict[str, None] = {}
    for value in metrics.values():
        columns |= dict.fromkeys(value) if isinstance(value, Mapping) else {"": None}
    head = ""
    if list(columns) != [""]:
        head = "<thead><tr><th></th>" + "".join(f"<th scope=col>{markup(c)}</th>" for c in columns) + "</tr></thead>"
    rows = []
    for name, value in metrics.items():
        cells = value if isinstance(value, Mapping) else {"": value}
        row = "".join(f"<td>{_figure(cells[c]) if c in cells else ''}</td>" for c in columns)
        rows.append(f"<tr><th scope=row>{markup(name)}</th>{row}</tr>")
    return f'<div class="metrics"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _figure(value: Number) -> str:
    if value is None:
        return "not computed"
    if isinstance(value, tuple):
        middle, low, high = map(show_number, value)
        return f"{middle} <small>[{low}, {high}]</small>"
    return markup(show_number(value)) if isinstance(value, (int, float)) else markup(value)


def _language(code: str | None) -> str:
    """The `lang` attribute, if the code is one."""
    return f' lang="{code}"' if code and re.fullmatch(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*", code) else ""


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
