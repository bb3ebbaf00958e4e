"""mmt ablate: captioners of one size on the same towers, one table and one picture."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from mmtransformer import CaptionBatch, TextDecoder, ViT
from mmtransformer.cli import main
from mmtransformer.layers.modes import is_frozen
from mmtransformer.training.evaluation.ablation import CAPTIONERS, Frozen, connector_parameters, sized

FROZEN = Frozen(freeze_vision=True, freeze_decoder=True)

RECIPE = """
trainer: {max_steps: 2, max_epochs: 1, accelerator: cpu, log_every_n_steps: 1, limit_val_batches: 1}
model:
  class_path: mmtransformer.training.Captioning
  init_args:
    captioner:
      class_path: mmtransformer.PrefixCaptioner
      init_args:
        freeze_vision: false
        hidden_dim: 2000
        pixel_shuffle: 2
        vision:
          class_path: mmtransformer.ViT
          init_args: {image_size: 32, patch_size: 8, dim: 32, depth: 1, num_heads: 2}
        decoder:
          class_path: mmtransformer.TextDecoder
          init_args: {vocab_size: 300, dim: 32, depth: 2, num_heads: 2, max_len: 110}
data:
  class_path: mmtransformer.data.CaptionData
  init_args:
    source:
      class_path: mmtransformer.data.Scenes
      init_args: {image_size: 32, train_size: 8, val_size: 3, compositional_size: 2}
    transform: {image_size: 32}
    vocab_size: 300
    batch_size: 4
    max_len: 60
    splits:
      val: [val]
"""


@pytest.mark.parametrize("name", CAPTIONERS)
def test_captioners_get_the_size_that_is_asked_for(name: str) -> None:
    vision, decoder = ViT(32, 4, 48, 1, 3), TextDecoder(97, 64, 3, 4, max_len=128)
    model = sized(name, vision, decoder, 400_000, FROZEN)
    assert connector_parameters(model) == pytest.approx(400_000, rel=0.02)
    assert connector_parameters(model) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.vision is vision
    assert is_frozen(vision)
    open_towers = sized(name, vision.requires_grad_(True), decoder, 400_000, Frozen(
        freeze_vision=False, freeze_decoder=True))  # fmt: skip
    assert connector_parameters(open_towers) == connector_parameters(model)
    tokens = torch.randint(97, (4, 5))
    batch = CaptionBatch(tokens, tokens >= 0, tokens >= 0, pixels=torch.randn(2, 1, 3, 32, 32))
    assert model.logits(batch).shape == (4, 5, 97)


def test_what_cannot_be_built() -> None:
    vision, decoder = ViT(32, 4, 48, 1, 3), TextDecoder(97, 64, 3, 4, max_len=128)
    with pytest.raises(ValueError, match="no captioner corss; there are cross, flamingo, qformer, prefix"):
        sized("corss", vision, decoder, 400_000, FROZEN)
    with pytest.raises(ValueError, match=r'"flamingo" has at least \d\d,\d{3} .* towers, more than 1,000'):
        sized("flamingo", vision, decoder, 1000, FROZEN)


def test_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE, "utf-8")
    words = ["--config", str(recipe), "--out", str(out)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(["ablate", *words, "--data.batch_size=3"])
    said, err = capsys.readouterr()
    assert code == 0, err
    table = json.loads((out / "ablation.json").read_text("utf-8"))
    assert list(table) == ["cross", "flamingo", "qformer", "prefix"]
    sizes = [row["connector parameters"] for row in table.values()]
    assert max(sizes) / min(sizes) < 1.04
    assert all(row["steps"] == 2 for row in table.values())
    assert table["prefix"].keys() >= {"facts % val en", "facts % val ko", "val loss right image", "seconds"}
    assert (out / "ablation.png").read_bytes()[1:4] == b"PNG"
    assert "facts % val ko" in said
    assert (out / "qformer/gallery.png").is_file()
    assert main(["ablate", "--config", str(recipe), "--captioners", "flamigno"]) == 2
    assert "no captioner flamigno" in capsys.readouterr().err
    for words in (["--connectors", "prefix"], ["--connectors=prefix"]):
        with pytest.raises(SystemExit, match="2"):
            main(["ablate", "--config", str(recipe), *words])
        said = capsys.readouterr().err
        assert said.startswith("mmt ablate: error: unrecognized arguments: --connectors")
        assert '; did you mean "--captioners"?; see' in said


def test_a_recipe_whose_language_model_has_a_connector_within_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = RECIPE.replace("PrefixCaptioner", "VisionEncoderDecoder").replace("hidden_dim: 2000", "")
    recipe = recipe.replace("        pixel_shuffle: 2\n", "").replace("max_len: 110}", "max_len: 110, context_dim: 32}")
    Path("recipe.yaml").write_text(recipe, "utf-8")
    assert main(["ablate", "--config", "recipe.yaml", "--captioners", "prefix"]) == 2
    assert "needs one that reads text alone, as that of flamingo_scenes" in capsys.readouterr().err
    assert not Path("runs/ablate_recipe/prefix/metrics.json").exists()
