"""Pictures of what a model does: galleries (PNG and HTML), word heat maps, training curves; Korean without a font."""

from mmtransformer.plots.attention_maps import draw_attention, draw_rollout, rollout_maps
from mmtransformer.plots.cards import Card, CardCaption
from mmtransformer.plots.curves import save_loss_curves
from mmtransformer.plots.files import save_image
from mmtransformer.plots.gallery import draw_gallery
from mmtransformer.plots.heatmap import draw_word_heatmaps, grid_box, overlay
from mmtransformer.plots.html_gallery import save_html_gallery

__all__ = [
    "Card",
    "CardCaption",
    "draw_attention",
    "draw_gallery",
    "draw_rollout",
    "draw_word_heatmaps",
    "grid_box",
    "overlay",
    "rollout_maps",
    "save_html_gallery",
    "save_image",
    "save_loss_curves",
]
