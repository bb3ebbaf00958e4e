"""The optimizers and their schedules: AdamW that spares vectors, Muon for matrices; warm-up, then a decline."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mmtransformer.layers.config import known_fields
from mmtransformer.layers.kernels import bfloat16_hardware
from mmtransformer.training.engine.guard import NonFiniteError
from mmtransformer.training.engine.internals import newton_schulz_in
from mmtransformer.training.engine.parameters import lr_scales


@known_fields
@dataclass(frozen=True)
class OptimConfig:
    """How weights are learned.

    Args:
        kind: "adamw", or "muon" for matrices with NAdamW for the rest: small models learn from fewer samples.
        lr: The peak learning rate.
        weight_decay: Decay of matrices; vectors (norms, biases) have none, and what `no_weight_decay()` names.
        betas: AdamW's decay rates, and NAdamW's.
        warmup_steps: Steps until the peak.
        lr_schedule: What follows the warm-up: half a "cosine" over the run, or "inverse_sqrt" of the step, whatever the
            length of the run (Vaswani et al. 2017; their peak is `noam_peak`).
        min_lr_ratio: What is left of the peak at the end of the cosine.
        ema_decay: Decay of an exponential moving average of the weights, which then is what is validated and saved; 0 =
            none.
        nonfinite: What happens at a step whose loss or gradient is NaN or infinite: "stop" ends the run, "skip" leaves
            the weights as they are and counts the step (10 in a row end the run all the same).
        layer_decay: In every tower a layer learns at the rate of the one above it times this, as timm's layer decay; 1
            = all at the same rate. BLIP-2's own fine-tuning takes 0.95.
        lr_scales: Parts of the model, such as "vision" or "decoder", and what their rate is multiplied by besides.

    Raises:
        ValueError: If a number is out of its range.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 100
    lr_schedule: Literal["cosine", "inverse_sqrt"] = "cosine"
    min_lr_ratio: float = 0.01
    ema_decay: float = 0.0
    nonfinite: Literal["stop", "skip"] = "stop"
    layer_decay: float = 1.0
    lr_scales: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name, kinds in get_type_hints(type(self)).items():
            if get_origin(kinds) is Literal and (value := getattr(self, name)) not in get_args(kinds):
                known = " or ".join(f'"{kind}"' for kind in get_args(kinds))
                raise ValueError(f'optim.{name} must be {known}, not "{value}"')
        for name in ("lr", "weight_decay", "min_lr_ratio"):
            if not 0.0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"optim.{name} ({value}) must be a number of at least 0")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(
                f"optim.ema_decay ({self.ema_decay}) must be at least 0 and below 1; 0.999 is usual, 0 takes none"
            )
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"optim.layer_decay ({self.layer_decay}) must be above 0 and at most 1; 0.75 is usual")
        for part, scale in (self.lr_scales or {}).items():
            if not 0.0 < scale < math.inf:
                raise ValueError(
                    f"optim.lr_scales: {part} is {scale}, which must be above 0; freeze what is not to learn"
                )

    def build(self, module: nn.Module, *, fused: bool = True) -> Optimizer:
        """The optimizer of a module's trainable parameters; `fused` is for AdamW."""
        scales = None
        if self.layer_decay != 1.0 or self.lr_scales:
            scales = lr_scales(module, self.layer_decay, self.lr_scales)
        if self.kind == "muon":
            return muon(module, lr=self.lr, weight_decay=self.weight_decay, betas=self.betas, scales=scales)
        return adamw(module, lr=self.lr, weight_decay=self.weight_decay, betas=self.betas, fused=fused, scales=scales)

    def schedule(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """Its learning rate over a run of so many steps."""
        if self.lr_schedule == "inverse_sqrt":
            return warmup_inverse_sqrt(optimizer, warmup_steps=self.warmup_steps)
        return warmup_cosine(
            optimizer, warmup_steps=self.warmup_steps, total_steps=total_steps, min_lr_ratio=self.min_lr_ratio
        )

    @staticmethod
    def refuse_rates(optimizer: Optimizer, step: int) -> None:
        """Refuses a learning rate that is NaN or infinite before it enters the weights; no loss shows it till then.

        Raises:
            NonFiniteError: Naming the step.
        """
        if odd := [rate for group in optimizer.param_groups if not math.isfinite(rate := float(group["lr"]))]:
            raise NonFiniteError(
                f"step {step}: the learning rate is {odd[0]:g}; the weights were left as they were. See optim"
            )


def adamw(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.98),
    fused: bool = True,
    scales: Mapping[str, float] | None = None,
) -> AdamW:
    """AdamW over the trainable parameters; norms, biases, other vectors and what `no_weight_decay()` names are spared.

    Args:
        module: The module whose parameters with ``requires_grad`` are trained.
        lr: The peak learning rate.
        weight_decay: Decoupled decay of matrices and kernels (Loshchilov & Hutter 2019).
        betas: Decay rates of the two moment estimates.
        fused: One kernel for all parameters, where the device has it.
        scales: What the rate of each parameter is multiplied by (`parameters.lr_scales`); None = 1 for all.

    Returns:
        The optimizer with two parameter groups a rate, the highest rate and the decayed one first.

    Raises:
        ValueError: If nothing is trainable.
    """
    trainable, spared = _trainable(module), _spared(module)
    groups = [
        {"params": [p for p in trainable.values() if p not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trainable.values() if p in spared], "weight_decay": 0.0},
    ]
    fused = fused and all(p.device.type in ("cpu", "cuda") for p in trainable.values())
    return AdamW(_by_rate(groups, trainable, scales, lr), lr=lr, betas=betas, fused=fused)


def _by_rate(
    groups: list[dict[str, Any]], named: dict[str, nn.Parameter], scales: Mapping[str, float] | None, lr: float
) -> list[dict[str, Any]]:
    """The groups that are not empty, each divided by the rates of its parameters, the highest rate first."""
    if scales is None:
        return [group for group in groups if group["params"]]
    rates = {parameter: lr * scales[name] for name, parameter in named.items()}
    found = []
    for rate in sorted(set(rates.values()), reverse=True):
        some = [{**group, "params": [p for p in group["params"] if rates[p] == rate], "lr": rate} for group in groups]
        found += [group for group in some if group["params"]]
    return found


def muon(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.98),
    scales: Mapping[str, float] | None = None,
) -> Optimizer:
    """Muon (Jordan et al. 2024; arXiv:2502.16982) for the matrices of blocks, NAdamW at half the rate for all else.

    A step makes a matrix's update orthogonal, so that no direction is starved: small models learn in fewer pictures,
    at some more work a step. Its updates are scaled to AdamW's size, so learning rates of AdamW are a fair start.

    The steps are timm's: Nesterov's momentum for both kinds of parameter, which makes an NAdamW of the AdamW (Dozat
    2016); and five Newton-Schulz iterations, each with coefficients of its own (timm's "quintic"), where Jordan's have
    one set, (3.4445, -4.7750, 2.0315).

    The arguments are those of `adamw`, with the peak of the matrices, the decay of everything that is not spared, and
    NAdamW's rates; so is the error. The optimizer is timm's, one for both kinds of parameter. Its iterations are in
    bfloat16, and in float32 on a CPU that is not faster in bfloat16: a Zen 3 multiplies 78 times as fast.
    """
    from timm.optim import muon as timm

    class Muon(timm.Muon):
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            device = self.param_groups[0]["params"][0].device
            slow = device.type == "cpu" and not bfloat16_hardware(device).fast
            with newton_schulz_in(torch.float32 if slow else torch.bfloat16):
                return super().step(closure)

    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},  # matrices of blocks
        {"params": [], "weight_decay": weight_decay, "use_fallback": True},
        {"params": [], "weight_decay": 0.0, "use_fallback": True},
    ]
    spared = _spared(module)
    trainable = _trainable(module)
    for name, parameter in trainable.items():
        inner = "blocks." in name and parameter.ndim == 2
        groups[2 if parameter in spared else 0 if inner else 1]["params"].append(parameter)
    kept = _by_rate(groups, trainable, scales, lr)
    return Muon(kept, lr=lr, betas=betas, nesterov=True, fallback_lr_scale=0.5)


def _spared(module: nn.Module) -> set[nn.Parameter]:
    """What is not decayed: vectors, and what a module of any depth names in `no_weight_decay()` (timm's protocol)."""
    spared = {p for p in module.parameters() if p.ndim <= 1}
    for part in module.modules():
        named = dict(part.named_parameters())
        names: Callable[[], Collection[str]] | None = getattr(part, "no_weight_decay", None)
        spared |= {named[name] for name in names() if name in named} if callable(names) else set()
    return spared


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("nothing to train: every parameter of the model is frozen; leave at least one part unfrozen")
    return trainable


def warmup_cosine(
    optimizer: torch.optim.Optimizer, *, warmup_steps: int, total_steps: int, min_lr_ratio: float = 0.0
) -> LambdaLR:
    """A schedule per step: linear from almost nothing to the peak, then half a cosine down.

    Args:
        optimizer: The optimizer; its learning rate is the peak.
        warmup_steps: Steps of the rise; at most ``total_steps`` are used.
        total_steps: Steps of the whole run.
        min_lr_ratio: What is left of the peak at the last step, in [0, 1].

    Raises:
        ValueError: If a number is out of its range.
    """
    if total_steps < 1 or warmup_steps < 0:
        raise ValueError(f"total_steps ({total_steps}) must be at least 1 and warmup_steps ({warmup_steps}) at least 0")
    if not 0.0 <= min_lr_ratio <= 1.0:
        raise ValueError(f"min_lr_ratio ({min_lr_ratio}) must lie between 0 and 1")
    warmup = min(warmup_steps, total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


def warmup_inverse_sqrt(optimizer: torch.optim.Optimizer, *, warmup_steps: int) -> LambdaLR:
    """A schedule per step: linear to the peak, then peak * sqrt(warmup_steps / step) ("Noam"; arXiv:1706.03762, 5.3).

    Args:
        optimizer: The optimizer; its learning rate is the peak.
        warmup_steps: Steps of the rise.

    Raises:
        ValueError: If there is no warm-up.
    """
    if warmup_steps < 1:
        raise ValueError(f'lr_schedule "inverse_sqrt" needs warmup_steps of at least 1, not {warmup_steps}')
    return LambdaLR(optimizer, lambda step: min((step + 1) / warmup_steps, (warmup_steps / (step + 1)) ** 0.5))


def noam_peak(dim: int, warmup_steps: int = 4000) -> float:
    """The paper's peak for a model of width dim, (dim * warmup_steps)^-1/2: 7e-4 for its base model."""
    return (dim * warmup_steps) ** -0.5
