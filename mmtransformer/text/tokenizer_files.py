"""Reading the files that a tokenizer is kept in, by this library, by hubs, or as GPT-2 and BERT were published."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mmtransformer.serialization.untrusted import check_plain
from mmtransformer.text.clip_tokenizer import clip_backend
from mmtransformer.text.sentencepiece_files import LLAMAS, SENTENCEPIECE, read_llama

_MOST_STEPS, _MOST_GROWTH, _MOST_AHEAD = 100, 64, 1000
_GPT2, _BERT = ("GPT2Tokenizer",), ("BertTokenizer", "DistilBertTokenizer")
_REMEDY = (
    "where transformers has what it needs for them (pip install transformers sentencepiece), "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes a tokenizer.json"
)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*")


def read_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Reads the files beside a tokenizer that name its special tokens."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; of a name on the hub, load_tokenizer fetches the tokenizer")
    settings = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"):
        if (path := folder / name).exists():
            check_plain(path)
            try:
                settings[name] = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise ValueError(f"{path}: not readable as JSON: {error}") from error
            if not isinstance(settings[name], dict):
                raise ValueError(f"{path}: holds a {type(settings[name]).__name__}, not an object")
    return settings


def read_backend(folder: Path, settings: dict[str, dict[str, Any]]) -> tokenizers.Tokenizer:
    """Reads the tokenizer itself from whichever files are there."""
    config = settings.get("tokenizer_config.json", {})
    path = folder
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"):
        if (folder / name).exists():
            check_plain(folder / name)
    try:
        if (path := folder / "tokenizer.json").is_file():
            return tokenizers.Tokenizer.from_file(str(path))
        if (path := folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            if str(config.get("tokenizer_class")).removesuffix("Fast") == "CLIPTokenizer":
                return clip_backend(*models.BPE.read_file(str(path), str(folder / "merges.txt")))
            backend = tokenizers.Tokenizer(models.BPE.from_file(str(path), str(folder / "merges.txt")))
            _check_class(folder, config, _GPT2, "vocab.json with merges.txt")
            spaced = bool(config.get("add_prefix_space"))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=spaced)
            backend.decoder = decoders.ByteLevel()
            _add_specials(backend, folder, config)
            bos = _text(config.get("bos_token"))
            if config.get("add_bos_token") and bos is not None and (index := backend.token_to_id(bos)) is not None:
                backend.post_processor = processors.TemplateProcessing(
                    single=f"{bos}:0 $A:0", special_tokens=[(bos, index)]
                )
            if not settings and backend.token_to_id("<|endoftext|>") is not None:  # GPT-2 as it was published
                settings["GPT-2"] = {"eos_token": "<|endoftext|>"}
            return backend
        if (path := folder / "vocab.txt").is_file():
            backend = tokenizers.Tokenizer(models.WordPiece.from_file(str(path), unk_token="[UNK]"))
            _check_class(folder, config, _BERT, "vocab.txt")
            backend.normalizer = normalizers.BertNormalizer(
                lowercase=bool(config.get("do_lower_case", True)),
                strip_accents=config.get("strip_accents"),
                handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
            )
            backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            backend.decoder = decoders.WordPiece()
            usual = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
            settings.setdefault("BERT", usual)
            _add_specials(backend, folder, {**usual, "unk_token": "[UNK]", "mask_token": "[MASK]", **config})
            cls, sep = (_text(config.get(name)) or usual[name] for name in ("cls_token", "sep_token"))
            ids = [(token, backend.token_to_id(token)) for token in (cls, sep)]
            if all(index is not None for _, index in ids):
                backend.post_processor = processors.TemplateProcessing(
                    single=f"{cls}:0 $A:0 {sep}:0", special_tokens=ids
                )
            return backend
        if (path := folder / "tokenizer.model").is_file() and _is_llama(settings):
            backend = read_llama(path, config)
            _add_specials(backend, folder, config)
            settings.setdefault("Llama", {"bos_token": "<s>", "eos_token": "</s>"})
            return backend
    except UnknownClassError:
        raise
    except BaseException as error:  # `tokenizers` raises bare Exception, and in its depths Rust's panic, which is none
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ValueError(f"{path}: not readable as a tokenizer: {error}") from error
    if slow := [name for name in SENTENCEPIECE if (folder / name).exists()]:
        kind = config.get("tokenizer_class")
        raise ValueError(
            f"{folder}: {slow[0]} is SentencePiece's file, of which only a Llama's is read here, not that of a {kind}; "
            f"{_REMEDY}"
        )
    raise ValueError(
        f"{folder}: holds no tokenizer.json, no vocab.json with merges.txt, and no vocab.txt; "
        f"it holds: {', '.join(sorted(p.name for p in folder.iterdir())[:9]) or 'nothing'}"
    )


class UnknownClassError(ValueError):
    """Files of a tokenizer whose class says that they are read in another way."""


def _is_llama(settings: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether SentencePiece's file is a Llama's, by its tokenizer's class, or else by its model's kind."""
    name = settings.get("tokenizer_config.json", {}).get("tokenizer_class")
    kind = settings.get("config.json", {}).get("model_type")
    return name in LLAMAS or (name is None and kind in ("llama", "mistral", "llava"))


def _check_class(folder: Path, config: Mapping[str, Any], known: Sequence[str], files: str) -> None:
    name = config.get("tokenizer_class")
    if name is not None and str(name).removesuffix("Fast") not in known:
        raise UnknownClassError(f"{folder}: {files} of a {name} is read in a way that is not here; {_REMEDY}")


def _text(token: Any) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _add_specials(backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Adds what files list as tokens of their own, in the order of their ids; named ones are special."""
    added: dict[int, tuple[str, bool]] = {}
    if (path := folder / "added_tokens.json").exists():
        check_plain(path)
        added |= {int(index): (token, True) for token, index in json.loads(path.read_text("utf-8")).items()}
    for index, values in config.get("added_tokens_decoder", {}).items():
        added[int(index)] = (values["content"], bool(values.get("special", False)))
    named = [_text(config.get(f"{role}_token")) for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    named += [_text(token) for token in config.get("additional_special_tokens") or ()]
    for index, (token, special) in sorted(added.items()):
        (backend.add_special_tokens if special else backend.add_tokens)([tokenizers.AddedToken(token, special=special)])
        if (got := backend.token_to_id(token)) != index:
            raise ValueError(f"{token!r} is listed with the id {index}, and gets {got} behind the vocabulary")
    there = [token for token in dict.fromkeys(named) if token is not None and backend.token_to_id(token) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in there])


def find_token(
    folder: Path, settings: Mapping[str, Mapping[str, Any]], vocab: Mapping[str, int], *roles: str
) -> str | None:
    """Looks a special token up: the first of the roles that a file names, by its text or by its id.

    Args:
        folder: Where the files are, for errors.
        settings: What `read_settings` has read, a file each.
        vocab: The tokenizer's tokens and their ids.
        roles: "eos" and the like, what is wanted most first.

    Raises:
        ValueError: If a file names a token that there is not, but for an id that texts begin with; names file and key.
    """
    for role in roles:
        for file, values in settings.items():
            token = values.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token
            index = values.get(f"{role}_token_id")
            index = index[0] if isinstance(index, list) and index else index
            if token is None and isinstance(index, int) and index >= 0:  # -1 means none
                token = next((text for text, i in vocab.items() if i == index), None)
                if token is None and role != "bos":  # BLIP's texts begin with an id that only the model has
                    raise ValueError(f"{folder / file}: {role}_token_id is {index}, an id without a token")
            if isinstance(token, str):
                if token not in vocab:
                    raise ValueError(
                        f"{folder / file}: {role}_token is {token!r}, "
                        f"which is not among the tokenizer's {len(vocab)} tokens"
                    )
                return token
    return None


def find_ends(folder: Path, settings: Mapping[str, Mapping[str, Any]], vocab: Mapping[str, int]) -> list[str]:
    """The tokens of all ids that any file lists as `eos_token_id`, each once; arguments as for `find_token`.

    Raises:
        ValueError: If one is an id without a token; names the file.
    """
    tokens, found = {index: token for token, index in vocab.items()}, dict[str, None]()
    for file, values in settings.items():
        listed = values.get("eos_token_id")
        for index in listed if isinstance(listed, list) else []:
            if not isinstance(index, int) or index not in tokens:
                raise ValueError(f"{folder / file}: eos_token_id has {index!r}, an id without a token")
            found[tokens[index]] = None
    return list(found)


def read_languages(folder: Path, settings: Mapping[str, Mapping[str, Any]], vocab: Mapping[str, int]) -> list[str]:
    """The codes of the languages that a folder's tokenizer tags; arguments as for `find_token`.

    Raises:
        ValueError: If they are no codes, or one has no token; names the file.
    """
    path = folder / "tokenizer_config.json"
    languages = settings.get(path.name, {}).get("languages", [])
    if not isinstance(languages, list) or not all(isinstance(code, str) for code in languages):
        raise ValueError(f"{path}: languages is {languages!r:.80}, not a list of codes")
    if missing := [code for code in languages if f"<|{code}|>" not in vocab]:
        raise ValueError(
            f"{path}: languages names {missing[0]!r}, but '<|{missing[0]}|>' is not among the tokenizer's {len(vocab)} "
            f"tokens"
        )
    return languages


def check_languages(codes: Sequence[str]) -> None:
    """Refuses what is no code of a language.

    Raises:
        ValueError: naming it.
    """
    for code in codes:
        if not _LANGUAGE.fullmatch(code):
            raise ValueError(f'language {code!r} is not a code such as "en", "ko" or "pt-BR"')


def read_end_ids(folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> list[int] | None:
    """The ids that end a text where they are not those of the eos token: "end_ids" of tokenizer_config.json.

    Raises:
        ValueError: If they are no ids; names the file.
    """
    path = folder / "tokenizer_config.json"
    ends = settings.get(path.name, {}).get("end_ids")
    if ends is not None and not (isinstance(ends, list) and all(isinstance(i, int) for i in ends)):
        raise ValueError(f"{path}: end_ids is {ends!r:.80}, not a list of ids")
    return ends


def check_growth(description: dict[str, Any]) -> dict[str, Any]:
    """Refuses a tokenizer that makes far more of a text than it is: steps that double it double what they have doubled.

    Args:
        description: What tokenizer.json says; it is given back.

    Raises:
        ValueError: If a letter may become more than 64, or there are more than a hundred steps; the longest that
            Unicode's own normal forms make of one are 18.
    """
    steps = [step for name in ("normalizer", "pre_tokenizer") for step in _flat(description.get(name))]
    if len(steps) > _MOST_STEPS:
        raise ValueError(f"tokenizer.json: {len(steps):,} steps before the words; at most {_MOST_STEPS} are known")
    growth, ahead = 1.0, 0
    for step in steps:
        growth *= _growth(step)
        ahead += len(str(step.get("prepend", "")))
        if growth > _MOST_GROWTH or ahead > _MOST_AHEAD:
            raise ValueError(
                f"tokenizer.json: its {step.get('type')!r} and the steps before it may make {growth:,.0f} letters of "
                f"one, and put {ahead:,} before a text; {_MOST_GROWTH} and {_MOST_AHEAD:,} are the most"
            )
    return description


def _flat(step: Any) -> list[dict[str, Any]]:
    """A step of a tokenizer, or those of a sequence, of any depth."""
    found, open_ = [], [step]
    while open_:
        step = open_.pop()
        if isinstance(step, dict):
            inner = [part for name in ("normalizers", "pretokenizers") for part in step.get(name) or ()]
            open_ += inner[::-1]
            found += [] if inner else [step]
    return found


def _growth(step: Mapping[str, Any]) -> float:
    """How many letters a step may make of one."""
    if step.get("type") == "Replace":
        pattern, content = step.get("pattern") or {}, len(str(step.get("content", "")))
        # A pattern may also stand for nothing, between any two letters.
        return max(1.0, content / max(1, len(pattern["String"])) if "String" in pattern else 1.0 + content)
    if step.get("type") == "ByteLevel":
        return 2.0
    if step.get("type") == "Precompiled":
        data = base64.b64decode(step.get("precompiled_charsmap") or "")
        strings = data[4 + int.from_bytes(data[:4], "little") :]  # behind the trie, each ended by a zero
        return max([1.0, *(float(len(text.decode("utf-8", "replace"))) for text in strings.split(b"\0"))])
    return 1.0


def check_encodable(text: str) -> None:
    """Refuses a text that is no Unicode.

    Raises:
        ValueError: naming the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has a lone surrogate, {text[error.start]!r} at character {error.start}: it was read with "
            f'the wrong encoding; read it as UTF-8 with errors="replace"'
        ) from error
