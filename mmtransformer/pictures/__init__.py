"""Pictures of what a model does: galleries (PNG and HTML), word heat maps, training curves; Korean without a font."""

from mmtransformer.pictures.attention_maps import attention_sheet, rollout_maps, rollout_sheet
from mmtransformer.pictures.cards import Card, Said
from mmtransformer.pictures.curves import loss_curves
from mmtransformer.pictures.gallery import gallery
from mmtransformer.pictures.heatmap import grid_box, overlay, word_heatmaps
from mmtransformer.pictures.page import html_page

__all__ = [
    "Card",
    "Said",
    "attention_sheet",
    "gallery",
    "grid_box",
    "html_page",
    "loss_curves",
    "overlay",
    "rollout_maps",
    "rollout_sheet",
    "word_heatmaps",
]
