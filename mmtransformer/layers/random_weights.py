"""First weights, at random."""

from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary


def trunc_normal_(tensor: Tensor, std: float) -> Tensor:
    """`nn.init.trunc_normal_`, cut at +-2 (not at 2 std); a mode can leave it out, as it can the other ones of torch.

    Args:
        tensor: filled in place.
        std: standard deviation.
    """
    if has_torch_function_unary(tensor):
        return handle_torch_function(trunc_normal_, (tensor,), tensor, std)
    return nn.init.trunc_normal_(tensor, std=std)
