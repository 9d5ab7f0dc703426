"""Row-wise pieces of the softmax over a vocabulary that several ranks may share, in plain torch.

Shape legend: c rows, V vocabulary entries of this rank. Targets outside [0, V) are another rank's.
"""

from __future__ import annotations

import torch


def statistics(logits_cV: torch.Tensor, targets_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per row: largest logit, sum of exponentials relative to it, and the target's logit (-inf if it is not here).

    Uses the logits up: what it leaves in their place is for `error` alone.
    """
    here_c, index_c1 = _here(targets_c, logits_cV.shape[1])
    target_c = logits_cV.gather(1, index_c1).squeeze(1).masked_fill(~here_c, -torch.inf)
    max_c = logits_cV.amax(1).clamp_min(torch.finfo(logits_cV.dtype).min)  # no inf - inf where all is -inf
    sum_c = logits_cV.sub_(max_c.unsqueeze(1)).exp_().sum(1)
    return max_c, sum_c, target_c


def error(
    used_cV: torch.Tensor,
    targets_c: torch.Tensor,
    max_c: torch.Tensor,
    all_max_c: torch.Tensor,
    all_sum_c: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[c, V] in `dtype`: softmax - one-hot target, the gradient of the cross-entropy with respect to the logits.

    used_cV: what `statistics` left. max_c: this rank's. all_max_c, all_sum_c: largest logit, and sum of exponentials
    relative to it, over the whole vocabulary.
    """
    here_c, index_c1 = _here(targets_c, used_cV.shape[1])
    used_cV.mul_((max_c - all_max_c).exp_().div_(all_sum_c).unsqueeze(1))
    return used_cV.scatter_add_(1, index_c1, -here_c.to(used_cV.dtype).unsqueeze(1)).to(dtype)


def _here(targets_c: torch.Tensor, V: int) -> tuple[torch.Tensor, torch.Tensor]:
    here_c = (targets_c >= 0) & (targets_c < V)
    return here_c, targets_c.where(here_c, 0).unsqueeze(1)
