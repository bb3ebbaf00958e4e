"""Training: the LightningModules, what watches over them, and what a run leaves in its folder."""

from mmtransformer.training.captioning import Captioning, finetune
from mmtransformer.training.checkpoints import CheckpointError, CheckpointFiles
from mmtransformer.training.classify import Classification
from mmtransformer.training.evaluation import Evaluation, evaluate
from mmtransformer.training.guard import NotFinite
from mmtransformer.training.language import LanguageModelling
from mmtransformer.training.masked import MaskedLanguageModelling
from mmtransformer.training.optim import Optim
from mmtransformer.training.precision import pick_precision
from mmtransformer.training.progress import Progress
from mmtransformer.training.report import write_report
from mmtransformer.training.samples import Samples
from mmtransformer.training.saving import Saving, Stopped
from mmtransformer.training.stage1 import QFormerStage1
from mmtransformer.training.task import Run, Task
from mmtransformer.training.translation import Translation

__all__ = [
    "Captioning",
    "CheckpointError",
    "CheckpointFiles",
    "Classification",
    "Evaluation",
    "LanguageModelling",
    "MaskedLanguageModelling",
    "NotFinite",
    "Optim",
    "Progress",
    "QFormerStage1",
    "Run",
    "Samples",
    "Saving",
    "Stopped",
    "Task",
    "Translation",
    "evaluate",
    "finetune",
    "pick_precision",
    "write_report",
]
