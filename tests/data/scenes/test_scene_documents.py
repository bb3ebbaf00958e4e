"""Documents of drawn scenes: one aspect a document, pure functions of the seed, and few-shot scores."""

import random
import re
from collections import Counter

import pytest
import torch

from mmtransformer import Flamingo, ImageTransform, TextDecoder, ViT
from mmtransformer.data.documents.documents import Documents, DocumentSource
from mmtransformer.data.interleaved_data import InterleavedData
from mmtransformer.data.loading.source import Pairs
from mmtransformer.data.scenes.facts import score as score_facts
from mmtransformer.data.scenes.grammar import parse
from mmtransformer.data.scenes.meaning import Facts
from mmtransformer.data.scenes.scene_documents import ASPECTS, SceneDocuments, answer
from mmtransformer.data.scenes.words import say
from mmtransformer.data.scenes.world import FILLS, SHAPES, Group
from mmtransformer.generation.captions import CaptionResult
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.training.evaluation import few_shot as few_shot_module
from mmtransformer.training.evaluation.few_shot import FewShotScores, score_few_shot

KOREAN = re.compile("[가-힣]")


def test_documents_follow_from_seed_split_and_number() -> None:
    source = SceneDocuments(image_size=32, train_size=61, val_size=7, seed=3)
    assert isinstance(source, DocumentSource)
    train, again = (
        source.split("train"),
        SceneDocuments(image_size=32, train_size=61, val_size=7, seed=3).split("train"),
    )
    assert isinstance(train, Documents)
    assert (len(train), len(source.split("val"))) == (61, 7)
    assert [train.document(i) for i in range(61)] == [again.document(i) for i in reversed(range(61))][::-1]
    assert train.image(5, 1).tobytes() == again.image(5, 1).tobytes()
    assert train.image(5, 0).tobytes() != train.image(5, 1).tobytes() != train.image(6, 1).tobytes()
    other = SceneDocuments(image_size=32, train_size=61, seed=4).split("train")
    assert [train.document(i) for i in range(61)] != [other.document(i) for i in range(61)]
    assert train.document(3) != source.split("val").document(3)
    assert train.image_name(5, 1) == "scene-documents-3-train-000005/1"
    assert {train.document(i).images for i in range(61)} == {2, 3, 4, 5}
    assert 4 < sum(bool(train.document(i).texts[0]) for i in range(61)) < 25


def test_every_text_of_a_document_says_the_same_kind_of_thing_of_its_image() -> None:
    split = SceneDocuments(image_size=32, train_size=211).split("train")
    aspects: Counter[tuple[str, str]] = Counter()
    for i in range(211):
        document, aspect, language = split.document(i), split.aspect(i), split.language(i)
        assert document.language == language
        aspects[aspect, language] += 1
        for k, text in enumerate(document.texts[1:]):
            scene = split.scene(i, k)
            assert bool(KOREAN.search(text)) == (language == "ko")
            if aspect == "description":
                assert parse(text, language) == Facts.of(scene)
            else:
                assert text == say(scene.groups[0], aspect, language)
                assert text in said_by_a_person(scene.groups[0], language).values()
    assert set(aspects) == {(aspect, language) for aspect in ASPECTS for language in ("en", "ko")}


COLORS_KO = "red 빨간색 orange 주황색 yellow 노란색 green 초록색 blue 파란색 purple 보라색 white 하얀색 black 검은색"
SHAPES_KO = ["원", "사각형", "삼각형", "별", "하트", "마름모", "십자가", "초승달", "오각형", "화살표"]


def said_by_a_person(group: Group, language: str) -> dict[str, str]:
    """The short answers, written out."""
    if language == "en":
        count = ["zero", "one", "two", "three", "four"][group.count]
        return {"count": count} | {f: getattr(group, f) for f in ("color", "shape", "size", "fill")}
    words = COLORS_KO.split()
    return {
        "color": words[words.index(group.color) + 1],
        "shape": dict(zip(SHAPES, SHAPES_KO, strict=True))[group.shape],
        "count": ["", "하나", "둘", "셋", "넷"][group.count],
        "size": {"small": "작다", "large": "크다"}[group.size],
        "fill": dict(zip(FILLS, ("꽉 찬", "줄무늬", "점무늬", "속이 빈"), strict=True))[group.fill],
    }


def test_questions_and_examples_are_pairs() -> None:
    source = SceneDocuments(image_size=32)
    english, korean = (source.pairs("questions", 9, "color", code) for code in ("en", "ko"))
    assert isinstance(english, Pairs)
    assert [english.name(i) for i in range(9)] == [korean.name(i) for i in range(9)]
    assert english.image(4).tobytes() == korean.image(4).tobytes()
    for i in range(9):
        (caption,) = korean.captions(i)
        assert caption.text == say(english.scene(i).groups[0], "color", "ko")
        assert caption.language == "ko"
    assert source.pairs("examples", 9, "color", "en").image(4).tobytes() != english.image(4).tobytes()
    (description,) = source.pairs("questions", 9, "description", "en").captions(2)
    assert parse(description.text, "en") == Facts.of(english.scene(2))
    with pytest.raises(IndexError, match="picture 9 of split 'questions', which has 9"):
        english.scene(9)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"image_size": 16}, "image_size must be at least 32 px, got 16"),
        ({"train_size": 0}, "train_size must be at least 1, got 0"),
        ({"num_images": (3, 2)}, r"num_images must be the fewest .* got \(3, 2\)"),
        ({"num_images": (0, 2)}, r"got \(0, 2\)"),
        ({"openings": 2}, "openings is a share, from 0 to 1, got 2"),
        ({"aspects": ("smell",)}, r"aspects must be different ones of description, color, .* got \['smell'\]"),
        ({"languages": ("en", "en")}, "languages must be different ones of en, ko"),
    ],
)
def test_impossible_documents_are_refused(settings: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        SceneDocuments(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no split 'test'; there are train, val"):
        SceneDocuments().split("test")
    with pytest.raises(IndexError, match="document 200 of split 'val', which has 200"):
        SceneDocuments().split("val").document(200)


# --------------------------------------------------------------------------------------------- what examples are worth


def data_and_model() -> tuple[InterleavedData, Flamingo]:
    source = SceneDocuments(image_size=32, train_size=40, val_size=6, aspects=("description", "color"))
    data = InterleavedData(source, transform=ImageTransform(16), vocab_size=330, batch_size=4, row_len=160)
    data.setup("fit")
    model = Flamingo(ViT(16, 8, 12, 1, 2, class_token=False, pool="mean"), TextDecoder(400, 20, 1, 2, max_len=400))
    return data, model


def test_scores_after_every_number_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = data_and_model()
    seen: list[tuple[int, str | None]] = []

    def from_two_on(captioner, tokenizer, batch, languages, *, generation, prompt_builder):  # type: ignore[no-untyped-def]
        """Answers right if there are at least two examples, and of the aspect of the examples."""
        assert generation.num_beams == 1
        prompted = prompt_builder(batch, languages)
        shots = prompted.visual_tokens.shape[1] - 1
        seen.append((shots, languages[0]))
        rows = []
        for name, row in zip(batch.names, prompted.tokens, strict=True):
            questions = prompt_builder.examples
            pairs = data.source.pairs("questions", 6, questions.aspect, questions.language)
            at = [pairs.name(i) for i in range(6)].index(name)
            assert tokenizer.decode(row.tolist()[: row.tolist().index(tokenizer.image_token_id)]) == ""
            text = pairs.captions(at)[0].text if shots >= 2 else "nothing"
            rows.append([[CaptionResult(text, languages[0], [], 0.0, [], [], True)]])
        return rows

    monkeypatch.setattr(few_shot_module, "write_captions", from_two_on)
    scores = score_few_shot(
        model, data, [0, 1, 2, 4], generation=GenerationConfig(num_beams=3), device=torch.device("cpu")
    )
    assert set(scores.scores) == {f"{aspect}, {code}" for aspect in ("description", "color") for code in ("en", "ko")}
    for by in scores.scores.values():
        assert by == {0: 0.0, 1: 0.0, 2: 1.0, 4: 1.0}
    assert {shots for shots, _ in seen} == {0, 1, 2, 4}
    assert {code for _, code in seen} == {"en", "ko"}
    assert scores.to_dict()["scores"]["color, ko"] == {"0": 0.0, "1": 0.0, "2": 1.0, "4": 1.0}  # type: ignore[index]
    table = scores.table().splitlines()
    assert table[0].split()[-4:] == ["0", "1", "2", "4"]
    assert table[1].split()[-4:] == ["0.0", "0.0", "100.0", "100.0"]


def test_a_real_model_is_scored_too() -> None:
    data, model = data_and_model()
    generation = GenerationConfig(num_beams=1, max_new_tokens=5)
    device = torch.device("cpu")
    scores = score_few_shot(model, data, [0, 2], generation=generation, device=device, limit_batches=1)
    assert all(0 <= score <= 1 for by in scores.scores.values() for score in by.values())
    pairs = score_few_shot(model, data.captions, [0], generation=generation, device=device, limit_batches=1)
    assert pairs.unit == "CIDEr-D"
    assert "val, en" in pairs.scores


def test_the_facts_of_a_description_are_scored() -> None:
    questions = SceneDocuments(image_size=32).pairs("questions", 5, "description", "en")
    said = [questions.captions(i)[0].text for i in range(5)]
    assert score_facts(said, [questions.scene(i) for i in range(5)], "en").facts == 1
    assert answer(questions.scene(0), "count", "ko", random.Random(0)) in ("하나", "둘", "셋", "넷")


def test_the_means_of_all_kinds_stand_in_a_line() -> None:
    scored = FewShotScores("% of answers right", {"a": {0: 0.1, 2: 0.9}, "b": {0: 0.3, 2: 1.0}, "c": {2: 0.5}})
    assert scored.headline() == "% of answers right after so many examples: 0: 20.0, 2: 80.0; shown here after none"
