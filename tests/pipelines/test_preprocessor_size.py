"""How large the pixels of a saved model may be."""

import json
from pathlib import Path

import pytest

from mmtransformer import ImageTransform
from mmtransformer.pipelines.base import read_transform


@pytest.mark.parametrize("size", [32, 128, [128, 96]])
def test_pixels_of_up_to_four_times_the_models_sides_are_taken(tmp_path: Path, size: int | list[int]) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(ImageTransform(32).to_dict() | {"image_size": size}), "utf-8")
    assert read_transform(path, (32, 32)).size[0] == (size if isinstance(size, int) else size[0])


@pytest.mark.parametrize("size", [132, [32, 160], 4096, 10_000])
def test_pixels_far_above_the_models_positions_are_refused(tmp_path: Path, size: int | list[int]) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(ImageTransform(32).to_dict() | {"image_size": size}), "utf-8")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: image_size is .* more than"):
        read_transform(path, (32, 32))
