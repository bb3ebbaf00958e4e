"""Captions to words, as the official COCO caption evaluation cuts them, without Java.

The published BLEU, ROUGE-L, METEOR and CIDEr-D of captioning are counted on the words of the Stanford
Penn-Treebank tokeniser, lower case, with a list of punctuation taken out. This is our own lexer with
the same behaviour, found by asking the official tool: at each place every rule is tried and the longest
match wins, and a look-ahead counts towards the length.

Quirks that are kept, because published figures contain them:

- brackets become ``-lrb-``, ``-rrb-`` ... and stay, since only their upper-case names are on the list;
- ``!!``, ``?!`` stay; one ``!``, ``?``, ``.``, ``...``, ``,``, ``;``, ``:``, ``-``, ``--`` and quotes go;
- ``n't``, ``'s``, ``'ll`` ... are words of their own, ``cannot`` is ``can not``, ``gonna`` is ``gon na``;
- the full stop stays on abbreviations ("st.", "p.m.", and any word before ".," or ".;");
- "2 1/2" is one token with a no-break space inside (BLEU and CIDEr-D count it as two words, ROUGE-L as one);
- ``£`` becomes ``#``, ``€`` becomes ``$``, ``½`` becomes ``1/2``; emoji vanish.

Three things are sane here where the official tool is not: every caption is cut alone (there, line
breaks of any other kind than a newline shift all later captions, and the beginning of the next caption
decides about a last "A."), white space of any kind is a space, and text is brought to Unicode's composed
form first, so that Korean written in single letters equals Korean written in syllables.
"""

import re
import unicodedata
from collections.abc import Iterable

# Tokens that the COCO evaluation takes out after tokenising.
PUNCTUATION = frozenset({"'", "''", "`", "``", ".", "?", "!", ",", ":", ";", "-", "--", "..."})

# Letters of any script with their marks; digits, and numbers like one half, are not letters.
_L = (
    r"(?:[^\W\d_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2089\u2150-\u218f\u2460-\u24ff\u2776-\u2793\u3192-\u3195"
    r"\u3220-\u3229\u3248-\u324f\u3251-\u325f\u3280-\u3289\u32b1-\u32bf]|[\u0300-\u036f\u0900-\u0903\u093a-\u094f"
    r"\u0e31\u0e34-\u0e3a\u0e47-\u0e4e])"
)
_W = rf"(?:{_L}|\d)"  # letters and digits
_A = r"['\u2019]"  # apostrophes
_SPACE = r"[ \u00a0]"
# What may begin the next sentence, so that the full stop before it is no part of a lone letter's name.
_SENTENCE = (
    r"(?-i:[ ](?:A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many"
    r"|More|Mr\.|Ms\.|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We"
    r"|What|When|While|Yet|You)(?![\w])|[ ]?$)"
)

# Abbreviations keep their full stop; in lower case those of the second list are words ("miss.", "mass.").
_ABBREVIATIONS = [
    "adm",
    "al",
    "ala",
    "apr",
    "ariz",
    "assn",
    "assoc",
    "asst",
    "atty",
    "attys",
    "aug",
    "ave",
    "bancorp",
    "bhd",
    "bldg",
    "blvd",
    "brig",
    "bros",
    "calif",
    "capt",
    "cf",
    "cie",
    "cmdr",
    "co",
    "col",
    "colo",
    "comdr",
    "conn",
    "corp",
    "cos",
    "cpl",
    "ct",
    "dak",
    "dec",
    "dept",
    "dr",
    "drs",
    "elec",
    "esq",
    "est",
    "etc",
    "ext",
    "feb",
    "fla",
    "fri",
    "ft",
    "ga",
    "gen",
    "gov",
    "govs",
    "hon",
    "inc",
    "ind",
    "insp",
    "intl",
    "invt",
    "jan",
    "jr",
    "jul",
    "jun",
    "kan",
    "kans",
    "ky",
    "lieut",
    "lt",
    "ltd",
    "maj",
    "mar",
    "md",
    "messrs",
    "mfg",
    "mich",
    "minn",
    "mlle",
    "mme",
    "mo",
    "mon",
    "mont",
    "mr",
    "mrs",
    "ms",
    "msgr",
    "mt",
    "natl",
    "neb",
    "nev",
    "nov",
    "oct",
    "okla",
    "penn",
    "pfc",
    "ph",
    "plc",
    "pres",
    "prof",
    "profs",
    "pte",
    "pty",
    "pvt",
    "rd",
    "rep",
    "reps",
    "rev",
    "rt",
    "sen",
    "sens",
    "sep",
    "sept",
    "seq",
    "sgt",
    "spc",
    "sq",
    "sr",
    "st",
    "ste",
    "supt",
    "tel",
    "tenn",
    "thu",
    "thurs",
    "treas",
    "tue",
    "tues",
    "univ",
    "va",
    "vs",
    "vt",
    "wed",
    "wis",
    "wisc",
    "wm",
    "wyo",
]
_CAPITALISED = ["ark", "del", "ill", "la", "mass", "miss", "ore", "pa", "tex", "wash"]
_BEFORE_NUMBERS = ["fig", "figs", "no", "nos", "op", "pp", "prop"]  # "no. 5", but "no."

_KEEP_STOP = frozenset(_ABBREVIATIONS)

# Words that are two words. The cut comes after so many characters.
_PAIRS = {"cannot": 3, "gonna": 3, "gotta": 3, "lemme": 3, "gimme": 3, "wanna": 3}


def _any(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


# Each rule: what a token looks like. Group 1 is the token where the rest is look-ahead.
_WORDS = [
    rf"{_W}+(?:_{_W}+)*",
    rf"{_W}+(?:[-\u2010\u2011]{_W}+)+",  # well-known, 3-d
    rf"{_W}+(?:/{_W}+)+",  # and/or
    r"[A-Za-z]+(?:\.[A-Za-z]+)+",  # foo.jpg, www.foo.com, "dog.And"
    rf"({_L}+){_A}(?:s|d|m|ll|re|ve)(?!{_W})",  # dog|'s
    rf"([A-Za-z]*[A-Ma-mO-Zo-z])n{_A}t(?!{_W})",  # do|n't
    rf"(y{_A}){_L}",  # y'|all
    r"[A-Za-z](?:\.[A-Za-z])+\.",  # p.m.
    rf"[A-Za-z]\.(?!{_SENTENCE})",  # J. Smith
    rf"{_any(_ABBREVIATIONS)}\.",
    rf"(?-i:(?:{_any([w.upper() for w in _CAPITALISED])}|{_any([w.title() for w in _CAPITALISED])})\.)",
    rf"({_any(_BEFORE_NUMBERS)}\.){_SPACE}*\d",
    rf"({_L}+\.)[,;:]",
    rf"(?:(?-i:[A-HJ-XZ])|[dlno]){_A}{_L}{{2,}}",  # O'Brien, o'clock
    rf"(?:s{_A}mores|ev{_A}ry|li{_A}l|nat{_A}l|o{_A}o|cont{_A}d\.?|ma{_A}am|[eno]e?{_A}er|nor{_A}easter|c{_A}mon"
    rf"|hallowe{_A}en|hawai{_A}i|xi{_A}an|ol{_A}|somethin{_A}|dunkin{_A})(?!{_L})",
    r"[A-Za-z0-9._%+-]+@[A-Za-z0-9][A-Za-z0-9.-]*",
    r"[A-Za-z]+:/{2}[^ \"<>|()\u00a0]+[^ .!?,;:\"'<>|()\u00a0-]",  # http://...
    r"[A-Za-z]+(?:[!?][A-Za-z]+)+",
    r"(?-i:[A-Z]+(?:[&+][A-Z]+)+)",  # AT&T
    rf"n{_A}t(?!{_W})",
    r"[bwc]/o",
]
_NUMBERS = [
    r"\d+(?:[,.:]\d+)*",
    r"\d{1,2}[-/]\d{1,2}(?:[-/]\d{2,4})?",
    rf"\d+(?:{_SPACE}|-)?\d+/\d+",  # 2 1/2
    r"\d+/\d+",
    rf"(\d+){_A}s(?!{_W})",
    r"\.\d+",
]
_MARKS = [
    rf"{_A}(?:s|d|m|ll|re|ve)(?!{_W})",
    rf"{_A}(?:em|till?|cause|n{_A}?|\d\ds)(?!{_W})",
    rf"({_A}t)(?:is|was)(?!{_W})",
    r"</?[A-Za-z!?][^<>]*>",
    r"&(?:amp|lt|gt|quot|apos|nbsp);",
    r"[#@][A-Za-z_]\w*",
    r"[!?]+",
    r"\.\.\.|\.(?: \.){2}|\u2026",
    r"-+|[\u2010-\u2015]",
    r"[<>]?[:;=][-o*']?[()DPdpO\\:{@|\[\]]",  # :-)
    r"\^_+\^|[-x=~<>']\^|_+",
    r"''|``|\*+",
]
_RULES: dict[str, list[re.Pattern[str]]] = {
    "word": [re.compile(r, re.I) for r in _WORDS + _NUMBERS[:1]],
    "digit": [re.compile(r, re.I) for r in _NUMBERS + _WORDS[:3]],
    "mark": [re.compile(r, re.I) for r in _MARKS + _NUMBERS[-1:]],
}
_PLAIN = re.compile(r"[ \u00a0]*([A-Za-z]+)(?=$|[,;?!]? |\.$)")
_EASY = re.compile(r"[A-Za-z]+(?: [A-Za-z]+)*(?: \.)?")

_REPLACE = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "\u00a3": "#", "\u20a4": "#", "\u20ac": "$", "\u00a2": "cents", "\u00a4": "$",
    "\u00bd": "1/2", "\u00bc": "1/4", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3",
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "&nbsp;": "",
    "\u2026": "...", "\u2014": "--", "\u2013": "--",
    "\"": "''", "\u201c": "''", "\u201d": "''", "\u2018": "'", "\u2019": "'", "\u00b4": "'",
    "\u00ab": "''", "\u00bb": "''", "\u2039": "'", "\u203a": "'", "\u201e": "''", "\u201a": "'",
}  # fmt: skip


def fold(text: str) -> str:
    """Return the text in Unicode's composed form on one line, with runs of white space as one space."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def plain(text: str) -> str:
    """Return a text in lower case without punctuation, for comparing wordings.

    Apostrophes and hyphens inside words stay ("the dog's t-shirt"). The metrics do not use it: what they
    count are the words of ``tokenize``.
    """
    text = fold(text).lower().replace("\u2019", "'")
    return " ".join(re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text))


def tokenize(text: str) -> list[str]:
    """Cut a caption into words as the official COCO evaluation does: lower case, punctuation taken out.

    Args:
        text: One caption, any language. Words of Korean are what stands between spaces (eojeol), with
            punctuation cut off.

    Returns:
        The words. Empty if the caption holds nothing but punctuation.
    """
    text = fold(text)
    if _EASY.fullmatch(text):
        words = text.lower().split(" ")
        if words[-1] == ".":
            words.pop()
        if _PAIRS.keys().isdisjoint(words):
            return words
    out: list[str] = []
    place = 0
    while place < len(text):
        plain = _PLAIN.match(text, place)
        if plain is not None and not (plain.end() == len(text) - 1 and _abbreviated(text)):
            word = plain.group(1).lower()
            place = plain.end()
            cut = _PAIRS.get(word, 0)
            out += [word[:cut], word[cut:]] if cut else [word]
            continue
        if text[place] == " ":
            place += 1
            continue
        token = _longest(text, place)
        place += len(token)
        out += _written(token)
    return out


def _abbreviated(text: str) -> bool:
    """Tell whether the last word of a caption keeps its full stop."""
    last = text[text.rfind(" ") + 1 :]
    return last[:-1].lower() in _KEEP_STOP or (last[:-1].lower() in _CAPITALISED and not last.islower())


def _longest(text: str, place: int) -> str:
    first = text[place]
    kind = "digit" if first.isdigit() else "word" if first.isalpha() else "mark"
    best, token = 0, first
    for rule in _RULES[kind]:
        match = rule.match(text, place)
        if match is not None and match.end() - place > best:
            best = match.end() - place
            token = match.group(1) if rule.groups else match.group()
    return token


def _written(token: str) -> list[str]:
    token = token.lower()
    token = _REPLACE.get(token, token)
    if token in PUNCTUATION or not token:
        return []
    if token.isalpha() and token in _PAIRS:
        return [token[: _PAIRS[token]], token[_PAIRS[token] :]]
    if len(token) > 1 and not token.isalnum():
        if not token.strip("-"):
            return []
        token = (
            token.replace(" ", "\u00a0").replace("(", "-lrb-").replace(")", "-rrb-").replace("\u2019", "'")
        )
        return [token]
    if len(token) == 1 and not _visible(token):
        return []
    return [token]


def _visible(char: str) -> bool:
    return ord(char) < 0x10000 and unicodedata.category(char)[0] not in "C"
