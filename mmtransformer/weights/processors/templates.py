"""Chat templates of a folder, filled in as transformers does: jinja2 in its sandbox, where a template runs no code."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mmtransformer.serialization.pretrained import read_json
from mmtransformer.serialization.untrusted import check_plain, said

_GENERATION = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


class ChatTemplate:
    """A folder's chat template: chat_template.jinja, or that of chat_template.json, or of tokenizer_config.json.

    It can be pickled, so it travels to data-loading workers.

    Args:
        text: the template, in jinja.
        where: the file, for errors.
        specials: what it may name, such as bos_token.
    """

    def __init__(self, text: str, where: str, specials: Mapping[str, str] | None = None) -> None:
        self.text, self.where, self.specials = text, where, dict(specials or {})

    @classmethod
    def of(cls, folder: Path) -> "ChatTemplate | None":
        """The template of a folder; None = it has none.

        Raises:
            ValueError: if a file cannot be read.
        """
        config = folder / "tokenizer_config.json"
        values = read_json(config) if config.exists() else {}
        tokens = {key: value for key, value in values.items() if key.endswith("_token")}
        tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
        specials = {key: value for key, value in tokens.items() if isinstance(value, str)}
        if (path := folder / "chat_template.jinja").exists():
            check_plain(path)
            return cls(path.read_text("utf-8"), str(path), specials)
        if (path := folder / "chat_template.json").exists():
            found = read_json(path).get("chat_template")
        else:
            path, found = config, values.get("chat_template")
        if isinstance(found, list):  # several, by name
            found = next((one.get("template") for one in found if one.get("name") == "default"), None)
        return cls(found, str(path), specials) if isinstance(found, str) else None

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **values: Any
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]} and the like.
            add_generation_prompt: whether it ends where the assistant begins to speak.
            values: what else the template may name.

        Raises:
            ValueError: naming the file, if the template is damaged, forbids this conversation or reaches for what the
                sandbox does not give.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        # Marks what the assistant says, and changes nothing of the text.
        text = _GENERATION.sub(r"{%\1 if true \2%}{%\1 endif \2%}", self.text)
        given = {"tools": None, "documents": None, **self.specials, **values}
        try:
            return environment.from_string(text).render(
                messages=[*messages], add_generation_prompt=add_generation_prompt, **given
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise ValueError(f"{self.where}: the chat template does not take this prompt: {said(error)}") from error


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
