"""Health figures at their known extremes, and the k-NN probe against a plain loop."""

from __future__ import annotations

import math

import pytest
import torch

from cjepa_fast.evaluation.health import cosine_gap, feature_std, knn_accuracy, rankme


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_feature_std() -> None:
    assert feature_std(randn(4096, 64)).item() == pytest.approx(1, abs=0.02)
    assert feature_std(randn(1, 64).expand(100, 64)).item() == pytest.approx(0, abs=1e-6)
    assert feature_std(randn(4096, 64) + 10).item() == pytest.approx(0.1, abs=0.01)
    assert feature_std(7 * randn(64, 8)) == pytest.approx(feature_std(randn(64, 8)).item(), rel=1e-5)


def test_rankme() -> None:
    basis = torch.linalg.qr(randn(300, 16))[0]
    assert rankme(basis).item() == pytest.approx(16, rel=1e-3)
    assert rankme(basis[:, :4] @ randn(4, 32)).item() < 4.01
    assert rankme(randn(50, 1) @ randn(1, 32)).item() == pytest.approx(1, abs=1e-3)
    x = randn(40, 12, seed=3) * torch.linspace(0.1, 3, 12)
    sigma = torch.linalg.svdvals(x.double())
    p = sigma / sigma.sum() + 1e-7
    assert rankme(x).item() == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-5)
    assert torch.isfinite(rankme(torch.zeros(8, 4)))


def test_cosine_gap() -> None:
    """A perfect predictor of image-specific targets scores near 1; of targets that only encode the position, 0."""
    indices = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(b))[:6] for b in range(8)])
    indices = indices.view(8, 2, 3)
    images = torch.arange(8)[:, None, None]
    targets = randn(8, 20, 256)
    assert cosine_gap(targets[images, indices], targets, indices).item() == pytest.approx(1, abs=0.05)
    positional = randn(1, 20, 256).expand(8, 20, 256)
    assert cosine_gap(positional[images, indices], positional, indices).item() == pytest.approx(0, abs=1e-6)


def test_knn_against_a_loop() -> None:
    bank, queries = randn(60, 5), randn(33, 5, seed=1)
    bank_labels, labels = torch.arange(60) % 4, torch.arange(33) % 4
    k, temperature, correct = 7, 0.07, 0
    for query, label in zip(queries, labels, strict=True):
        cosines = torch.cosine_similarity(query[None], bank)
        votes = [0.0] * 4
        for index in cosines.argsort(descending=True)[:k].tolist():
            votes[int(bank_labels[index])] += math.exp(cosines[index] / temperature)
        correct += votes.index(max(votes)) == label
    assert 0.1 < correct / 33 < 0.9
    found = knn_accuracy(bank, bank_labels, queries, labels, k=k, temperature=temperature)
    assert found == correct / 33
    assert knn_accuracy(bank, bank_labels, bank, bank_labels, k=1) == 1
