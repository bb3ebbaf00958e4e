"""Weights shared out among processes (FSDP2): gradients, moments and averages too; frozen towers block by block.

Every process holds a part of each weight, and has the whole of it while it is used. A checkpoint holds whole weights,
named and numbered as those of any other run, so one process may go on with what many began, and the other way round.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from mmtransformer.connectors.qformer_block import QFormerBlock
from mmtransformer.training.engine.internals import forget_sharding, make_root, share_data
from mmtransformer.training.engine.recompute_and_compile import blocks

STEPS = ("training_step", "validation_step", "test_step", "compute_again")
"""What of a task needs whole weights; they are gathered before and let go of after each."""


class Sharded(ModelParallelStrategy):
    """Shares a task's weights out among all processes: `mmt fit ... --trainer.strategy fsdp`, with torch's FSDP2.

    In a recipe "fsdp" is this, not Lightning's strategy of that name, which wraps modules in torch's first FSDP.
    """

    def __init__(self) -> None:
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """All processes share the data."""
        share_data(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    def on_validation_start(self) -> None:
        """A validation has whole weights, as the end of the run has."""
        assert self.lightning_module is not None
        keep_unsharded(self.lightning_module)

    def on_validation_end(self) -> None:
        """Shares them out again."""
        assert self.lightning_module is not None
        shard_again(self.lightning_module)

    on_test_start, on_test_end = on_validation_start, on_validation_end

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state is in the same file, and `load_optimizer_state_dict` takes it."""
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on the first process, numbered as an optimizer numbers it."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        assert self.model is not None
        state: dict[str, Any] = get_optimizer_state_dict(self.model, optimizer, options=options)
        if not state.get("param_groups"):
            return {}
        names = [name for group in state["param_groups"] for name in group["params"]]
        number = {name: i for i, name in enumerate(names)}
        groups = [group | {"params": [number[n] for n in group["params"]]} for group in state["param_groups"]]
        return {"state": {number[n]: s for n, s in state["state"].items()}, "param_groups": groups}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Every process reads the whole file."""
        return self.checkpoint_io.load_checkpoint(str(checkpoint_path), weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Each process keeps its part; frozen weights are what they are."""
        state = {name: t for name, t in checkpoint["state_dict"].items() if not isinstance(t, DTensor)}
        assert self.model is not None
        set_model_state_dict(self.model, state, options=StateDictOptions(full_state_dict=True, strict=False))

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Each process keeps its part."""
        assert self.model is not None
        name_of = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            names = [name_of[p] for group in optimizer.param_groups for p in group["params"]]
            state = {
                "state": {names[number]: values for number, values in saved["state"].items()},
                "param_groups": [g | {"params": [names[i] for i in g["params"]]} for g in saved["param_groups"]],
            }
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self.model, optimizer, state, options=options)


def number_format(precision: str | int) -> tuple[str | None, list[DoublePrecision]]:
    """How Lightning takes a precision beside `Sharded`: it refuses the word for float64, not the thing.

    Args:
        precision: As in ``Trainer(precision=...)``.

    Returns:
        The precision to give it, and the plugins that are to go with it.

    Raises:
        ValueError: If it is float16, whose scaler would have to see all shares of the gradients.
    """
    word = str(precision)
    if word in ("64", "64-true"):
        return None, [DoublePrecision()]
    if word in ("16", "16-mixed"):
        raise ValueError(
            f"trainer.precision={word} does not go with trainer.strategy=fsdp; take bf16-mixed, 32-true or 64-true"
        )
    return word, []


def shard(task: LightningModule, mesh: DeviceMesh) -> None:
    """Shards a task: blocks that are used as a whole by themselves, all else together.

    A block whose keys and values are computed from outside it (`Attention.project_kv`) needs its weights before its own
    turn, so it belongs to what is gathered for the whole step; so do a Q-Former's, whose parts are called one by one.

    Args:
        task: The task; its class gets a subclass of torch's making.
        mesh: The processes.

    Raises:
        ValueError: If a weight is a single number, such as the temperature of a contrastive loss.
    """
    if single := [name for name, weight in task.named_parameters() if not weight.ndim]:
        raise ValueError(
            f"trainer.strategy=fsdp cannot share out {single[0]}, which is a single number; take --trainer.strategy ddp"
        )
    for block in blocks(task):
        if not isinstance(block, QFormerBlock) and not any(
            "Cross" in type(part).__name__ or "cross" in name for name, part in block.named_modules()
        ):
            fully_shard(block, mesh=mesh)
    fully_shard(task, mesh=mesh)
    for name in STEPS:
        if hasattr(task, name):  # a task of `Task` has them all
            register_fsdp_forward_method(task, name)


def keep_unsharded(task: LightningModule) -> None:
    """Gives every process the whole weights, until `shard_again`: no use of a block waits for another process then.

    In a validation processes need not do the same: one has fewer batches, one alone shows a sample.

    Args:
        task: What `shard` was given; all processes call this at once.
    """
    make_root(task)
    for part in _shared(task):
        part.unshard()
        if part is not task:  # which keeps its own after a step anyway
            part.set_reshard_after_forward(False, recurse=False)


def shard_again(task: LightningModule) -> None:
    """Ends what `keep_unsharded` began."""
    reshard(task)
    for part in _shared(task):
        if part is not task:
            part.set_reshard_after_forward(True, recurse=False)


def _shared(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def unshard(task: LightningModule) -> None:
    """Gives every process the whole weights again, and takes the sharding away: the task is as it was before.

    Args:
        task: What `shard` was given; all processes call this at once.
    """
    whole: list[tuple[nn.Module, str, nn.Parameter]] = []
    done: dict[nn.Parameter, nn.Parameter] = {}
    reshard(task)
    for part in task.modules():
        for name, parameter in part._parameters.items():
            if isinstance(parameter, DTensor):
                if parameter not in done:
                    # A weight that does not divide evenly comes as the front part of a larger buffer.
                    weight = parameter.full_tensor().detach().clone()
                    done[parameter] = nn.Parameter(weight, parameter.requires_grad)
                whole.append((part, name, done[parameter]))
    for part in _shared(task):
        forget_sharding(part)
    for part, name, parameter in whole:
        part._parameters[name] = parameter
    for name in STEPS:
        task.__dict__.pop(name, None)


def reshard(module: nn.Module) -> None:
    """Lets go of whole weights that a step (a validation's, say) has left gathered; shares alone remain."""
    for part in _shared(module):
        part.reshard()


def not_finite_in(tensors: Mapping[str, Tensor]) -> set[str]:
    """The names of tensors that are not finite, whichever process holds that part; all processes call this at once."""
    mine = {name for name, tensor in tensors.items() if not local(tensor.detach()).isfinite().all()}
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return mine
    found: list[set[str]] = [set()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return set().union(*found)


def local(tensor: Tensor) -> Tensor:
    """The part of a shared-out tensor that this process holds; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(part: Tensor, weight: Tensor) -> Tensor:
    """The whole of which `part` is this process's share, shared out as `weight` is; all processes call this at once."""
    if not isinstance(weight, DTensor):
        return part
    mesh, places = weight.device_mesh, weight.placements
    shared = DTensor.from_local(part, mesh, places, shape=weight.shape, stride=weight.stride())
    return shared.full_tensor()


def share_of(whole: Tensor, weight: Tensor) -> Tensor:
    """This process's share of a whole tensor, as `weight` is shared out."""
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements).to_local()
