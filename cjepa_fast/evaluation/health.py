"""Health figures, which tell collapse from learning when the loss cannot, and k-NN accuracy.

`features` are mean-pooled target embeddings [n, D] unless said otherwise; everything is computed in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_fast.networks.sequences import take_rows


def feature_std(features: Tensor) -> Tensor:
    """Average the standard deviations of L2-normalised features over dimensions, times sqrt(D): scalar.

    1 for features spread evenly over the sphere, 0 for features all alike (SimSiam, Chen & He, 2021, fig. 2).
    """
    unit = F.normalize(features.float(), dim=1)
    return unit.std(dim=0).mean() * features.shape[1] ** 0.5


def rankme(features: Tensor) -> Tensor:
    """Compute RankMe (Garrido et al., ICML 2023, arXiv 2210.02885): exp of the singular values' entropy, a scalar.

    Between 1 and min(n, D). Singular values are square roots of the eigenvalues of the D x D Gram matrix (fp64).
    """
    gram = features.double().T @ features.double()
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-7
    return torch.exp(-(p * p.log()).sum()).float()


def cosine_gap(predictions: Tensor, targets: Tensor, target_indices: Tensor) -> Tensor:
    """Subtract the mean cosine with another image's targets, at the same places, from that with the own targets.

    Near 0 when targets have become a pure code of position ("positional collapse", CAPI, Darcet et al., 2025), which
    loss and token-level spread do not show.

    Args: predictions [B, M, Kt, D], targets [B, N, D] (raw target embeddings), target_indices [B, M, Kt]; B >= 2.
    """
    normed = F.layer_norm(targets.float(), targets.shape[-1:])
    indices = target_indices.flatten(1)
    predicted = predictions.float().flatten(1, 2)
    own = F.cosine_similarity(predicted, take_rows(normed, indices), dim=-1).mean()
    other = F.cosine_similarity(predicted, take_rows(normed.roll(1, dims=0), indices), dim=-1).mean()
    return own - other


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:  # fmt: skip
    """Return the top-1 accuracy in [0, 1] of weighted k-NN with cosine similarity (Wu et al., CVPR 2018; as in DINO).

    Args: bank [n, D], queries [m, D]; labels int64 [n], [m]; neighbours vote with exp(cosine / temperature).
    """
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    classes = int(torch.maximum(bank_labels.max(), query_labels.max())) + 1
    correct = 0
    for part, labels in zip(queries.split(1024), query_labels.split(1024), strict=True):
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(part), classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        correct += int((votes.argmax(dim=1) == labels).sum())
    return correct / len(queries)
