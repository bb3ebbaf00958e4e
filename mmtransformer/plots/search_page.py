"""What a search has found, as one HTML file: pictures in rows, with their names and how near they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from mmtransformer.plots.html_gallery import CONTROLS, encode_image, whole_page
from mmtransformer.serialization.printable import markup
from mmtransformer.serialization.writing import write_whole


@dataclass(frozen=True)
class Found:
    """A picture that was found.

    Args:
        image: The picture; None = it can no longer be shown.
        name: Its name.
        score: How near it is, a cosine.
        link: What a click leads to, relative to the page or a whole address; "" for nothing.
        mark: A word beside the score, such as "same bytes".
    """

    image: Image | None
    name: str
    score: float
    link: str = ""
    mark: str = ""


def save_search_page(
    groups: Sequence[Sequence[Found]],
    path: str | Path,
    *,
    title: str,
    chips: Sequence[tuple[str, str]] = (),
    asked: Sequence[Image] = (),
    hint: str = "",
    image_size: int = 400,
) -> Path:
    """Writes what was found as a page of its own: it fetches nothing, and fits a phone and the dark.

    Args:
        groups: What was found, best first: one group for a search, one a group of near duplicates.
        path: The .html file to write.
        title: What was looked for, a stranger's text like the names: it is escaped.
        chips: Marks below the title, each a text with its kind: "good", "bad", "language" or "".
        asked: Pictures that were looked for.
        hint: A line below the title.
        image_size: Pixels of a small picture's longer side: sharp on a phone's screen, 10 to 30 KB each.

    Returns:
        The path.
    """
    several = len(groups) > 1
    body = ['<header class="asked">']
    body += [f'<img src="{encode_image(image, 240)}" alt="">' for image in asked]
    body.append(f'<div><h1 dir="auto">{markup(title)}</h1>')
    if chips:
        items = "".join(f'<li class="{kind}">{markup(text)}</li>' for text, kind in chips)
        body.append(f'<ul class="chips">{items}</ul>')
    body += [f'<p class="hint">{markup(hint)}</p>'] if hint else []
    body.append("</div></header>")
    body += [CONTROLS.replace("WHAT", "names")] if max(len(groups), *map(len, groups), 0) > 1 else []
    if not any(groups):
        body.append('<p class="hint">Nothing was found.</p>')
    elif several:
        sections = (_group(i, group, image_size) for i, group in enumerate(groups, 1))
        body += ['<main class="groups">', *sections, "</main>"]
    else:
        found = (_figure(i, one, image_size, f"{i}") for group in groups for i, one in enumerate(group, 1))
        body += ['<main class="found">', *found, "</main>"]
    return write_whole(path, whole_page(title, "\n".join(body)))


def _group(i: int, group: Sequence[Found], image_size: int) -> str:
    figures = "\n".join(_figure(n, one, image_size, "") for n, one in enumerate(group))
    return (
        f'<section class="group"><h2>{i} · {len(group)} pictures</h2>\n<div class="found">\n{figures}\n</div></section>'
    )


def _figure(i: int, found: Found, image_size: int, rank: str) -> str:
    if found.image is None:
        shown = '<div class="lost">cannot be shown</div>'
    else:
        wide, high = found.image.size
        lazy = ' loading="lazy" decoding="async"' if i > 6 else ""
        shown = f'<img{lazy} src="{encode_image(found.image, image_size)}" width="{wide}" height="{high}" alt="">'
    if found.link:
        shown = f'<a href="{markup(found.link)}">{shown}</a>'
    mark = f' <span class="mark">{markup(found.mark)}</span>' if found.mark else ""
    place = f"<b>{rank}</b> " if rank else ""
    name = markup(found.name)
    return (
        f'<figure>{shown}<figcaption><span class="score">{place}{found.score:.3f}{mark}</span>'
        f'<span class="name" title="{name}"><bdi>{name}</bdi></span></figcaption></figure>'
    )
