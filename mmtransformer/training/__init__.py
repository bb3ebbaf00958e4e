"""Training: the LightningModules, what watches over them, and what a run leaves in its folder."""

from mmtransformer.training.captioning import Captioning, finetune
from mmtransformer.training.evaluation import Evaluation, evaluate
from mmtransformer.training.guard import NotFinite
from mmtransformer.training.precision import pick_precision
from mmtransformer.training.progress import Progress
from mmtransformer.training.report import write_report
from mmtransformer.training.samples import Samples

__all__ = [
    "Captioning",
    "Evaluation",
    "NotFinite",
    "Progress",
    "Samples",
    "evaluate",
    "finetune",
    "pick_precision",
    "write_report",
]
