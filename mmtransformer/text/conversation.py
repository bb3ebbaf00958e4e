"""A question that is asked after other turns, as one text and as the messages of a chat."""

from collections.abc import Sequence
from typing import Any, Self


class Conversation(str):
    """What is asked of a picture at last, behind the questions and answers before it.

    As a text it is all of them in one line, for models that know no turns. It can be pickled.

    Args:
        turns: question, answer, ..., question.
    """

    __slots__ = ("turns",)
    turns: tuple[str, ...]

    def __new__(cls, turns: Sequence[str]) -> Self:
        """Joins the turns; see the class."""
        found = super().__new__(cls, " ".join(turns))
        found.turns = tuple(turns)
        return found

    def __getnewargs__(self) -> tuple[Any, ...]:
        """What `__new__` makes it of again."""
        return (self.turns,)


def turns_of(text: str) -> tuple[str, ...]:
    """The turns of a conversation; of any other text itself alone."""
    return text.turns if isinstance(text, Conversation) else (text,)


def messages_of(text: str) -> list[dict[str, Any]]:
    """What a chat template takes: the picture and the words of the first turn, then the others in turn."""
    said: list[dict[str, Any]] = []
    for i, turn in enumerate(turns_of(text)):
        words = [{"type": "text", "text": turn}] if turn else []
        image = [] if i else [{"type": "image"}]
        said.append({"role": "assistant" if i % 2 else "user", "content": [*image, *words]})
    return said
