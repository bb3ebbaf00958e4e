"""What is said of captions beside their scores."""

import pytest

from mmtransformer.generation.captions import CaptionResult
from mmtransformer.generation.config import GenerationConfig
from mmtransformer.training.evaluation.evaluation import ANY, Evaluation, Prediction


@pytest.mark.parametrize(("code", "where"), [(ANY, "val"), ("ko", "val, ko")])
def test_captions_without_a_readable_letter_are_counted(code: str, where: str) -> None:
    def evaluation(*texts: str) -> Evaluation:
        said = [CaptionResult(text, None, [], 0.0, [], [], True) for text in texts]
        some = [Prediction(i, f"{i}.png", each, ("a dog",)) for i, each in enumerate(said)]
        return Evaluation(GenerationConfig(), {"val": {code: some}})

    assert evaluation("", "\ufffd\ufffd", " .", "개").table() == (
        f"{where}: 3 of 4 captions are empty or hold no readable letters"
    )
    assert evaluation("a", "개", "7").table() == ""
