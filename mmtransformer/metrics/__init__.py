"""Caption metrics without Java, with confidence intervals.

``score_captions`` gives BLEU-1 to -4, ROUGE-L and CIDEr-D exactly as the official COCO evaluation, and
METEOR and SPICE through its Java programs where they are. ``compare`` tests two runs.
"""

from mmtransformer.metrics.bootstrap import Comparison
from mmtransformer.metrics.clipscore import clip_score, ref_clip_score
from mmtransformer.metrics.ptb import normalize_text, tokenize
from mmtransformer.metrics.retrieval import recall_at_k
from mmtransformer.metrics.scores import CaptionScores, compare, score_captions

__all__ = [
    "CaptionScores",
    "Comparison",
    "clip_score",
    "compare",
    "normalize_text",
    "recall_at_k",
    "ref_clip_score",
    "score_captions",
    "tokenize",
]
