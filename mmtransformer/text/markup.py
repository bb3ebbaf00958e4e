"""From captions with HTML in them, as they come off web pages, or with marked phrases, to plain text."""

import html
import re
from html.entities import html5

# also with spaces, as tokenizers of words leave them: "& quot ;"
_ENTITY = re.compile(r"&\s?(amp\s?;\s?)*(#\s?\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31})\s?;")
_NAMES = "a|abbr|b|big|blockquote|br|center|code|div|em|font|h[1-6]|hr|i|img|li|mark|ol|p|pre|q|s|small|span|strike"
_TAG = re.compile(
    rf"</?(?:{_NAMES}|strong|sub|sup|table|tbody|td|th|tr|tt|u|ul)(?:\s[^<>]*)?\s?/?>|<!--.*?-->", re.IGNORECASE
)


_PHRASE = re.compile(r"\[/EN#\d+(?:/\w+)+ ([^\[\]]*)\]")  # Flickr30k Entities


def find_markup(text: str) -> str | None:
    """The first of HTML's entities and tags in a text, such as "&amp;" and "<br>"; None if it has none.

    Marks of Flickr30k Entities, "[/EN#1/people a man]", count too.
    """
    if "[/EN#" in text and (found := _PHRASE.search(text)) is not None:
        return found[0]
    if "&" in text and (found := next((m[0] for m in _ENTITY.finditer(text) if _character(m) != m[0]), None)):
        return found
    found = _TAG.search(text) if "<" in text else None
    return found[0] if found else None


def strip_markup(text: str) -> str:
    """A text with what HTML's entities stand for, and without its tags.

    "Tom &amp; Jerry&#39;s<br>" becomes "Tom & Jerry's", "[/EN#1/people a man] walks" "a man walks". What was escaped
    twice ("&amp;quot;") is read twice. Signs that only look like HTML ("R&D;", "a < b") stay.
    """
    text = _PHRASE.sub(r"\1", text) if "[/EN#" in text else text
    plain = _TAG.sub(" ", _ENTITY.sub(_character, text)) if "&" in text else _TAG.sub(" ", text)
    return text if plain == text else " ".join(plain.split())


def _character(match: re.Match[str]) -> str:
    name = match[2].replace(" ", "")
    found = html.unescape(f"&{name};") if name[0] == "#" else html5.get(f"{name};", "")
    return found if (found.isprintable() and found.strip("\ufffd")) or found.isspace() else match[0]
