"""Private parts of Lightning, of torch's FSDP2 and of timm that a run leans on: all are here, and nowhere else.

Written for Lightning 2.6 and torch 2.11 to 2.15; pyproject.toml caps both, and this file is what to look through before
a cap is raised (of timm a public function is replaced while it is in use). What stands on it is exact resume
(tests/training/engine/test_resume.py and test_soak.py) and weights that are shared out (test_distributed.py).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping

from mmtransformer.data.loading.sampler import ResumableLoader

# ---------------------------------------------------------------------------------------------- Lightning's loops


def in_a_step(trainer: pl.Trainer) -> bool:
    """Whether the optimizer step of the batch that has just ended is still to come."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def epoch_ends(trainer: pl.Trainer) -> bool:
    """Whether the batch that has just ended is the last of its epoch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates after this batch."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def normalize_counters(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Brings the loops' counters into the one form that a run goes on from.

    The epoch is in its middle, all batches up to here are done, and a validation that was due is still due.

    Args:
        trainer: The trainer.
        checkpoint: What Lightning collected; it is changed.
    """
    loops = checkpoint["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    batch_ends = batches["current"]["completed"] < batches["current"]["processed"]
    for counts in (batches["total"], batches["current"]):
        counts["completed"] = counts["processed"]
    steps, follows = loops["epoch_loop.state_dict"], validation_follows(trainer)
    midway = trainer.validating or (batch_ends and follows)
    if midway:
        # "In the middle of a validation", none of whose batches is done: it is done anew.
        validation["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    elif batch_ends:
        steps["_batches_that_stepped"] += 1
    elif follows:  # The epoch has ended; going on, Lightning passes its validation over and counts a step for it.
        steps["_batches_that_stepped"] -= 1
    if not midway:  # Of a validation that was begun anew Lightning has counted a batch too few: it would do it again.
        validation["total"] = dict.fromkeys(validation["total"], validation["total"]["completed"])
    validation["current"] = dict.fromkeys(validation["current"], 0)
    for counts in (epochs["total"], epochs["current"]):
        counts["processed"] = counts["completed"]


class Place(NamedTuple):
    """Where a run stands between two steps, for a checkpoint that is taken in the middle of the next.

    Attributes:
        step: The optimizer steps that are done.
        sums: What gathers the sums of the step that comes: another one as soon as that has begun to change weights.
        loops: The loops' counters and the loaders' places.
    """

    step: int
    sums: object
    loops: dict[str, Any]


def place_of(trainer: pl.Trainer) -> Place:
    """Where a run stands; asked for when a step has ended."""
    checkpoint = {"loops": trainer._checkpoint_connector._get_loops_state_dict()}
    normalize_counters(trainer, checkpoint)
    sums = getattr(trainer.lightning_module, "_parts", None)
    return Place(trainer.global_step, sums, copy.deepcopy(checkpoint["loops"]))


def still_there(trainer: pl.Trainer, place: Place) -> bool:
    """Whether nothing has changed the weights since then."""
    return trainer.global_step == place.step and getattr(trainer.lightning_module, "_parts", None) is place.sums


def checkpoint_of(trainer: pl.Trainer, place: Place) -> dict[str, Any] | None:
    """A checkpoint of where the run stood; None if it has gone on meanwhile. Asks no other process for anything."""
    if not still_there(trainer, place):
        return None
    checkpoint = copy.deepcopy(
        trainer._checkpoint_connector.dump_checkpoint(weights_only=False) | {"loops": place.loops}
    )
    return checkpoint if still_there(trainer, place) else None


def resume_loaders(trainer: pl.Trainer) -> None:
    """Puts the loaders where the run was: Lightning may make them (to count the steps) before it reads the place.

    The place is a number of pictures, so it is good for any number of processes and workers.

    Args:
        trainer: The trainer, at the start of its training.
    """
    loop = trainer.fit_loop
    places, loader = loop._combined_loader_states_to_load, loop._combined_loader
    batches = loop.epoch_loop.batch_progress
    if not loop.restarting or loader is None:
        return
    if places:
        loader._load_state_dicts(places)
        loop._combined_loader_states_to_load = []
    if batches.is_last_batch and loop._data_fetcher is not None:
        loop._data_fetcher.done = True  # All batches of this epoch are done; the fetcher does not know.
    elif isinstance(found := loader.flattened[0], ResumableLoader):
        done = found.place.steps_before(found.place.start)  # where it was, in batches of this size
        for name in ("ready", "started", "processed", "completed"):
            setattr(batches.current, name, done)


# ---------------------------------------------------------------------------------------------------------- FSDP2


def share_data(strategy: ModelParallelStrategy, processes: int) -> None:
    """Lets so many processes share the data, where Lightning's "auto" asks for those of one machine."""
    strategy._data_parallel_size = processes


def make_root(module: nn.Module) -> None:
    """Makes a sharded module the root of its parts, before one of them is used alone and taken for it."""
    module._get_fsdp_state()._lazy_init()  # pyright: ignore[reportCallIssue]


def forget_sharding(module: Any) -> None:
    """Takes torch's hooks and class off a sharded module (there is no public way)."""
    state = module._get_fsdp_state()
    for handle in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
        handle.remove()
    for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
        if group is not None:
            for handles in (
                group._module_to_pre_save_state_dict_hook_handle,
                group._module_to_pre_load_state_dict_hook_handle,
            ):
                for handle in handles.values():
                    handle.remove()
    module.__class__ = type(module).__mro__[2]
    _module_state_mapping.pop(module, None)  # Else it could not be shared out again.
    for key in (REGISTRY_KEY, STATE_KEY):
        module.__dict__.pop(key, None)


# ------------------------------------------------------------------------------------------------------------ timm


@contextmanager
def newton_schulz_in(dtype: torch.dtype) -> Iterator[None]:
    """Within it timm's Muon makes its updates orthogonal in this number format; bfloat16 is written into it."""
    from timm.optim import muon

    bfloat16 = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = partial(bfloat16, dtype=dtype)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = bfloat16
