"""Training: the LightningModules, what watches over them, and what a run leaves in its folder."""

from typing import TYPE_CHECKING

from mmtransformer.lazy import lazy

if TYPE_CHECKING:
    from mmtransformer.training.callbacks.progress import Progress as Progress
    from mmtransformer.training.callbacks.samples import SamplePrinter as SamplePrinter
    from mmtransformer.training.callbacks.saving import LastCheckpoint as LastCheckpoint
    from mmtransformer.training.callbacks.saving import SignalExit as SignalExit
    from mmtransformer.training.engine.checkpoints import AtomicCheckpointIO as AtomicCheckpointIO
    from mmtransformer.training.engine.checkpoints import CheckpointError as CheckpointError
    from mmtransformer.training.engine.guard import NonFiniteError as NonFiniteError
    from mmtransformer.training.engine.optim import OptimConfig as OptimConfig
    from mmtransformer.training.engine.precision import pick_precision as pick_precision
    from mmtransformer.training.engine.run import Run as Run
    from mmtransformer.training.engine.task import Task as Task
    from mmtransformer.training.evaluation.evaluation import Evaluation as Evaluation
    from mmtransformer.training.evaluation.evaluation import evaluate as evaluate
    from mmtransformer.training.evaluation.report import write_report as write_report
    from mmtransformer.training.tasks.captioning import Captioning as Captioning
    from mmtransformer.training.tasks.captioning import finetune as finetune
    from mmtransformer.training.tasks.classification import Classification as Classification
    from mmtransformer.training.tasks.contrastive_learning import ContrastiveLearning as ContrastiveLearning
    from mmtransformer.training.tasks.contrastive_learning import finetune_clip as finetune_clip
    from mmtransformer.training.tasks.image_generation import ImageGeneration as ImageGeneration
    from mmtransformer.training.tasks.language_modeling import LanguageModeling as LanguageModeling
    from mmtransformer.training.tasks.masked_language_modeling import MaskedLanguageModeling as MaskedLanguageModeling
    from mmtransformer.training.tasks.qformer_stage1 import QFormerStage1 as QFormerStage1
    from mmtransformer.training.tasks.translation import Translation as Translation
    from mmtransformer.training.tasks.tuning import TuningConfig as TuningConfig

__getattr__, __dir__, __all__ = lazy(__name__, __file__)  # pyright: ignore[reportUnsupportedDunderAll]
