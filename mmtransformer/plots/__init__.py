"""Pictures of what a model does: galleries (PNG and HTML), word heat maps, training curves; Korean without a font."""

from mmtransformer.plots.attention_maps import attention_sheet, rollout_maps, rollout_sheet
from mmtransformer.plots.cards import Card, Said
from mmtransformer.plots.curves import loss_curves
from mmtransformer.plots.gallery import save_gallery
from mmtransformer.plots.heatmap import grid_box, overlay, word_heatmaps
from mmtransformer.plots.page import html_page

__all__ = [
    "Card",
    "Said",
    "attention_sheet",
    "grid_box",
    "html_page",
    "loss_curves",
    "overlay",
    "rollout_maps",
    "rollout_sheet",
    "save_gallery",
    "word_heatmaps",
]
