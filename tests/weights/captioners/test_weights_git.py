"""GIT: transformers' models there and back, on small random ones: logits, ids, frames, prompts, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoProcessor, BertTokenizer, CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

from mmtransformer import CaptionBatch, Git, NormConfig, TextDecoder, ViT, generate
from mmtransformer.weights import load_git, save_git
from mmtransformer.weights.captioners.git import git_from_state, to_git
from support.public import close, first_logits, ids, load, pictures, until_end, word_pieces

VOCAB, END = 53, 7
SHAPES: dict[str, dict[str, Any]] = {
    "base": {
        "vision_config": {"hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "image_size": 21, "patch_size": 7},
        "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 29,
    },
    "video, tied": {
        "vision_config": {"hidden_size": 18, "intermediate_size": 23, "num_hidden_layers": 3, "num_attention_heads": 2,
                          "image_size": 10, "patch_size": 5, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
        "hidden_size": 28, "num_hidden_layers": 3, "num_attention_heads": 7, "intermediate_size": 19,
        "num_image_with_embedding": 3, "tie_word_embeddings": True, "hidden_act": "relu", "layer_norm_eps": 1e-4,
    },
}  # fmt: skip


def theirs_of(shape: str) -> Any:
    torch.manual_seed(1)
    model = GitForCausalLM(
        GitConfig(**SHAPES[shape], vocab_size=VOCAB, max_position_embeddings=37, eos_token_id=END, bos_token_id=1)
    )
    for parameter in model.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    return model.eval()


def ours_of(theirs: Any) -> Git:
    return git_from_state(theirs.config.to_dict(), theirs.state_dict(), "it")


def pixels_of(theirs: Any, rows: int = 3, frames: int = 1) -> Tensor:
    torch.manual_seed(2)
    side = theirs.config.vision_config.image_size
    return torch.randn(rows, frames, 3, side, side)


def batch(pixels: Tensor, q: int = 6) -> CaptionBatch:
    torch.manual_seed(3)
    real = torch.arange(q) < torch.tensor([q, 2, 4])[: len(pixels), None]
    return CaptionBatch(torch.randint(VOCAB, (len(pixels), q)), real, real, pixels=pixels)


def same(found: Tensor, want: Tensor) -> None:
    assert ((found - want).norm() / want.norm()).item() < 1e-5
    assert want.std() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits(shape: str) -> None:
    theirs = theirs_of(shape)
    ours = ours_of(theirs)
    given = batch(pixels_of(theirs))
    assert given.pixels is not None
    want = theirs(input_ids=given.tokens, pixel_values=given.pixels[:, 0], attention_mask=given.attention_mask.long())
    real = given.attention_mask
    same(ours.logits(given)[real], want.logits[:, -6:][real])
    # Frames, and fewer of them than there are vectors for.
    for frames in (2, 3) if theirs.config.num_image_with_embedding else ():
        given = batch(pixels_of(theirs, frames=frames))
        want = theirs(input_ids=given.tokens, pixel_values=given.pixels, attention_mask=real.long())
        same(ours.logits(given)[real], want.logits[:, -6:][real])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_ids(shape: str, beams: int) -> None:
    """One by one as transformers has them, and left-padded prompts of a batch as each alone."""
    theirs = theirs_of(shape)
    ours = ours_of(theirs)
    given = batch(pixels_of(theirs))
    assert given.pixels is not None
    wanted = []
    for n, length in enumerate([6, 2, 4]):
        prompt = given.tokens[n : n + 1, :length]
        found = theirs.generate(
            input_ids=prompt, pixel_values=given.pixels[n], attention_mask=torch.ones_like(prompt), num_beams=beams,
            max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=END,
        )[0, length:].tolist()  # fmt: skip
        wanted.append(found[: found.index(END)] if END in found else found)
    order = given.attention_mask.long().argsort(dim=1, stable=True)
    left = [x.gather(1, order) for x in (given.tokens, given.attention_mask, given.loss_mask)]
    texts = generate(ours, CaptionBatch(*left, pixels=given.pixels), eos_id=END, max_new_tokens=9, num_beams=beams)
    assert [list(text[0].tokens) for text in texts] == wanted
    assert len({tuple(ids) for ids in wanted}) == 3


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_transformers_reads_what_is_written(shape: str, tmp_path: Path) -> None:
    ours = ours_of(theirs_of(shape))
    save_git(ours, tmp_path)
    theirs, report = GitForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert (theirs.output.weight is theirs.git.embeddings.word_embeddings.weight) == ours.decoder.tied
    given = batch(pixels_of(theirs, rows=1), q=3)
    assert given.pixels is not None
    want = theirs.eval()(input_ids=given.tokens, pixel_values=given.pixels[:, 0])
    same(ours.logits(given), want.logits[:, -3:])
    again = load_git(tmp_path)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    again.save_pretrained(tmp_path / "ours")
    assert torch.equal(Git.from_pretrained(tmp_path / "ours").logits(given), ours.logits(given))


def test_a_head_that_differs_stays_untied() -> None:
    theirs = theirs_of("video, tied")
    state = theirs.state_dict() | {"output.weight": theirs.output.weight + 1}
    ours = git_from_state(theirs.config.to_dict(), state, "it")
    assert not ours.decoder.tied
    assert torch.equal(ours.decoder.lm_head.weight, state["output.weight"])


@torch.no_grad()
def test_one_image_alone_has_no_order() -> None:
    theirs = theirs_of("video, tied")
    ours = ours_of(theirs)
    given = batch(pixels_of(theirs))
    before = ours.logits(given)
    ours.frame_embeds[0].data += 1
    assert torch.equal(ours.logits(given), before)
    with pytest.raises(ValueError, match="4 images of a sample, but this GIT knows the order of 3"):
        ours.logits(batch(pixels_of(theirs, frames=4)))


@torch.no_grad()
def test_a_folder_captions_and_answers_as_transformers(tmp_path: Path) -> None:
    tokenizer = BertTokenizer(vocab=word_pieces().get_vocab())
    begin, end = 2, 3
    torch.manual_seed(4)
    config = GitConfig(
        **SHAPES["base"], vocab_size=len(tokenizer), max_position_embeddings=61, bos_token_id=begin, eos_token_id=end
    )
    theirs: Any = GitForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    size = {"shortest_edge": 21}
    pixels = CLIPImageProcessor(size=size, crop_size={"height": 21, "width": 21})
    GitProcessor(pixels, tokenizer).save_pretrained(tmp_path)
    ours, images = load(tmp_path), pictures()
    given = AutoProcessor.from_pretrained(tmp_path)(images=images, return_tensors="pt")["pixel_values"]
    batch = ours.batch(images)
    assert batch.pixels is not None
    assert torch.equal(batch.pixels[:, 0], given)
    question = "what is this?"
    asked = [begin, *tokenizer(question, add_special_tokens=False)["input_ids"]]
    for beams in (1, 3):
        alone = theirs.generate(pixel_values=given, max_new_tokens=8, num_beams=beams, do_sample=False)
        assert ids(ours, images, [None] * 3, max_new_tokens=8, num_beams=beams) == until_end(alone[:, 1:], [end])
        prompt = torch.tensor([asked])
        for i, image in enumerate(images):
            found = theirs.generate(
                input_ids=prompt, pixel_values=given[i : i + 1], max_new_tokens=8, num_beams=beams, do_sample=False
            )
            want = until_end(found[:, prompt.shape[1] :], [end])
            assert ids(ours, [image], [question], max_new_tokens=8, num_beams=beams) == want
    want = theirs(input_ids=torch.full((3, 1), begin), pixel_values=given).logits[:, -1]
    close(first_logits(ours, images, [None] * 3), want)


def test_what_is_refused(tmp_path: Path) -> None:
    theirs = theirs_of("base")
    config, state = theirs.config.to_dict(), theirs.state_dict()
    with pytest.raises(ValueError, match="no activation like mish here"):
        git_from_state(config | {"hidden_act": "mish"}, state, "it")
    with pytest.raises(ValueError, match="no activation like tanh here"):
        git_from_state(config | {"vision_config": config["vision_config"] | {"hidden_act": "tanh"}}, state, "it")
    with pytest.raises(ValueError, match=r"missing: output\.weight"):
        git_from_state(config, {k: v for k, v in state.items() if k != "output.weight"}, "it")
    with pytest.raises(ValueError, match=r"unknown: git\.extra"):
        git_from_state(config, state | {"git.extra": torch.ones(1)}, "it")
    tower, text = ViT(16, 8, 12, 1, 2), TextDecoder(VOCAB, 12, 1, 2, norm=NormConfig(pre=False, embed=True))
    with pytest.raises(ValueError, match=r"CLIP's vision tower has nothing like .*patches"):
        to_git(Git(tower, text))
    with pytest.raises(ValueError, match=r"transformers' GIT has nothing like norm.pre=True"):
        to_git(Git(tower, TextDecoder(VOCAB, 12, 1, 2)))
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    with pytest.raises(ValueError, match='model_type is "blip", not "git"'):
        load_git(tmp_path)
    with pytest.raises(ValueError, match="its context_dim is None, not 12"):
        Git(tower, TextDecoder(VOCAB, 12, 1, 2, context_dim=12))
    with pytest.raises(ValueError, match=r"num_frames \(1\) must be at least 2"):
        Git(tower, text, num_frames=1)
