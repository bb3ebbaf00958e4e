"""What small random folders of public captioners are made of: sizes, tokenizers, a chat template."""

from typing import Any

from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from support.public import byte_level, word_pieces

WIDTH: Any = {"hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = WIDTH | {"image_size": 28, "patch_size": 7}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: {% for line in message['content'] %}"
    "{% if line['type'] == 'image' %}<image>\n{% else %}{{ line['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
POINTS = [[28, 56], [56, 28], [56, 56]]


def bert() -> Any:
    """A BERT tokenizer."""
    from transformers import BertTokenizer

    return BertTokenizer(vocab=word_pieces().get_vocab())


def chatting(padding_side: str = "left") -> Any:
    """A tokenizer with placeholders."""
    backend = byte_level(["<s>", "<pad>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    words = ["<image>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>"]
    words += [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    backend.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side=padding_side,
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def llama(words: Any) -> dict[str, Any]:
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return {**WIDTH, "vocab_size": len(words) + 3, "num_key_value_heads": 2, "max_position_embeddings": 509, **ids}
