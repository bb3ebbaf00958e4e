"""What is said of timm's names that are misspelt."""

import pytest

from mmtransformer.weights import load_vit


def test_the_nearest_name_that_loads_comes_first() -> None:
    with pytest.raises(ValueError, match="no timm model; did you mean deit_tiny_patch16_224, "):
        load_vit("deit_tny_patch16_224")
