"""Pictures of what a model does: galleries (PNG and HTML), word heat maps, training curves; Korean without a font."""

from mmtransformer.plots.attention_maps import plot_attention, plot_rollout, rollout_maps
from mmtransformer.plots.cards import Card, CardCaption
from mmtransformer.plots.curves import save_loss_curves
from mmtransformer.plots.files import save_image
from mmtransformer.plots.gallery import plot_gallery
from mmtransformer.plots.heatmap import grid_box, overlay, plot_word_heatmaps
from mmtransformer.plots.html_gallery import save_html_gallery

__all__ = [
    "Card",
    "CardCaption",
    "grid_box",
    "overlay",
    "plot_attention",
    "plot_gallery",
    "plot_rollout",
    "plot_word_heatmaps",
    "rollout_maps",
    "save_html_gallery",
    "save_image",
    "save_loss_curves",
]
