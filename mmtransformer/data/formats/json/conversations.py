"""Records of other programs as records of a picture and its caption: conversations, chats, Label Studio's tasks."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

KEYS = ("conversations", "messages", "conversation", "texts", "contents")
"""What the turns of a conversation are found under."""
_FORMS = (("from", "value"), ("role", "content"), ("role", "parts"))  # who says something, and what, in one turn
_PLACES = ("image", "image_url", "path", "fileData", "file_data", "inlineData", "inline_data")
_BOTH = ("user", "assistant")  # the keys of a question with its answer, in one
_MARK = re.compile(r"(?:Picture \d+:\s*)?<img>(.*?)</img>")  # a picture amid a text, as Qwen-VL writes it
_ASK, _ANSWER = ("human", "user"), ("gpt", "assistant", "model", "chatgpt")


class NoCaption(ValueError):
    """A conversation that has nothing to learn from; its message says why."""


def is_turn(keys: Collection[str]) -> bool:
    """Whether what has these keys is a turn of a conversation, or two of them."""
    return any(set(form) <= set(keys) for form in (*_FORMS, _BOTH))


def as_records(record: Any) -> tuple[list[Any], str]:
    """Records with the keys image and caption in place of a conversation or a task; any other one as it is.

    Known are LLaVA's `conversations` ("from", "value"), also with Qwen-VL's <img>a.jpg</img>, `messages` of chats
    ("role", "content", a text or a list of parts), Gemini's `contents` ("role", "parts"), the Cauldron's `texts`
    ("user", "assistant"), and Label Studio's tasks with their `data` and `annotations`. Each answer of a conversation
    is a caption; under "question" stands what was asked, a tuple where turns were before.

    Returns:
        The records, and what was left out of them, in words; "" = nothing.

    Raises:
        NoCaption: If a conversation has no answer, or not one picture.
    """
    if not isinstance(record, Mapping):
        return [record], ""
    for key in KEYS:
        turns = record.get(key)
        if isinstance(turns, list) and (key != "texts" or any(isinstance(turn, Mapping) for turn in turns)):
            return _conversation(record, [one for turn in turns for one in _single(turn)])
    if isinstance(record.get("data"), Mapping) and isinstance(record.get("annotations"), list):
        return [_task(record["data"], record["annotations"])], ""
    return [record], ""


def laid_open(record: Any) -> Any:
    """A record with what stands in its objects, in one of them alone, beside its own keys, which count first."""
    if not isinstance(record, Mapping):
        return record
    inside = [value for value in record.values() if isinstance(value, Mapping)]
    often = Counter(key for value in inside for key in value)
    return {key: item for value in inside for key, item in value.items() if often[key] == 1} | dict(record)


def _single(turn: Any) -> list[tuple[str, Any]]:
    """Who says what: of one turn, or of a question with its answer.

    Raises:
        NoCaption: If it is neither.
    """
    if not isinstance(turn, Mapping):
        raise NoCaption(f"a turn that is no object: {turn!r:.60}")
    if all(who in turn for who in _BOTH):
        return [(who, turn[who]) for who in _BOTH]
    who, what = next((form for form in _FORMS if set(form) <= set(turn)), _FORMS[0])
    return [(str(turn.get(who)).lower(), turn.get(what))]


def _place(part: Mapping[str, Any]) -> Any:
    """Where a chat's picture lies; of one that it holds itself, the letters."""
    return part.get("url") or part.get("fileUri") or part.get("file_uri") or part.get("data")


def _conversation(record: Mapping[str, Any], turns: list[tuple[str, Any]]) -> tuple[list[Any], str]:
    said: list[str] = []  # question, answer, question, ...
    images = record.get("images")
    listed = images if isinstance(images, list) else []
    named: list[Any] = []  # pictures in the turns
    for role, parts in turns:
        texts = []
        for part in parts if isinstance(parts, list) else [parts]:
            places = []
            if isinstance(part, Mapping):
                place = next((part[key] for key in _PLACES if part.get(key)), None)
                places = [_place(place) if isinstance(place, Mapping) else place]
                part = part.get("text")
            elif isinstance(part, str):
                places, part = _MARK.findall(part), _MARK.sub(" ", part)
            named += [place for place in places if place and place not in named]
            texts += [part] if isinstance(part, str) else []
        if role not in (*_ASK, *_ANSWER):
            continue
        text = " ".join(texts).replace("<image>", " ").strip()
        if len(said) % 2 != (role in _ANSWER):  # the same one goes on, or an answer comes first
            said = [*said[:-1], f"{said[-1]} {text}"] if said else ["", text]
        else:
            said.append(text)
    if len(said) < 2:
        raise NoCaption("no answer")
    own = record.get("image") or (listed[0] if len(listed) == 1 else None)
    image = own or (named[0] if len(named) == 1 else None)
    if not image or len(listed) > 1:
        count = len(listed) or len(named)
        raise NoCaption(f"{count} pictures" if count > 1 else "no picture")
    rest = {key: record[key] for key in ("split", "language") if key in record} | {"image": image}
    asked = [said[0] if end == 1 else tuple(said[:end]) for end in range(1, len(said), 2)]
    rows = [{"caption": said[2 * i + 1], "question": question} | rest for i, question in enumerate(asked)]
    return rows, f"a last question without an answer: {said[-1]:.60}" if len(said) % 2 else ""


def _task(data: Mapping[str, Any], annotations: list[Any]) -> dict[str, Any]:
    """A task of Label Studio: the picture of its data, and the texts that people wrote of it."""
    image = next((value for value in data.values() if isinstance(value, str) and "/" in value), None)
    captions: list[str] = []
    for annotation in annotations:
        results = annotation.get("result") if isinstance(annotation, Mapping) else None
        for result in results if isinstance(results, list) else ():
            value = result.get("value") if isinstance(result, Mapping) else None
            text = value.get("text") if isinstance(value, Mapping) else None
            captions += [text] if isinstance(text, str) else text if isinstance(text, list) else []
    return {"image": data.get("image") or data.get("img") or image, "caption": captions or data.get("caption")}
