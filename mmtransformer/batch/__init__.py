"""What models read and give: tensors that travel together."""

from mmtransformer.batch.base import Batch
from mmtransformer.batch.captions import CaptionBatch
from mmtransformer.batch.images import PackedImages
from mmtransformer.batch.output import ModelOutput, SumAndCount
from mmtransformer.batch.seq2seq import Seq2SeqBatch

__all__ = ["Batch", "CaptionBatch", "ModelOutput", "PackedImages", "Seq2SeqBatch", "SumAndCount"]
