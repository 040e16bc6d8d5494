"""The 20-NN probe: the accuracy of an encoder's mean embeddings on labelled images, without training anything."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from cjepa_fast.config import RunConfig
from cjepa_fast.distributed import gather_rows, world_size
from cjepa_fast.errors import UserError
from cjepa_fast.evaluation.health import knn_accuracy
from cjepa_fast.feed.bad import BadImages
from cjepa_fast.feed.batches import center_batches
from cjepa_fast.feed.decode import Place
from cjepa_fast.feed.mixture import Mixture
from cjepa_fast.feed.order import epoch_order
from cjepa_fast.feed.sources import printable

NEIGHBOURS = 20
_SPLIT_SEED = 20  # of the choice of bank and queries: fixed, so that all runs on a data set have the same probe


class Probe:
    """A fixed bank of labelled images and fixed queries.

    Args:
        source: labelled training images, which give the bank.
        queries: labelled images of the same classes, which give the queries. None: other images of `source`, whose
            labels are never trained on, though their pixels are.
        run: `probe_bank` and `probe_queries` limit the two sets.
        batch_size: images per pass of one process.
        on_error: treatment of an image that turned bad, see `BadImages`.

    Raises UserError if there are no labels, or the two sets have different classes.
    """

    def __init__(
        self, source: Mixture, queries: Mixture | None, run: RunConfig, *, image_size: int, batch_size: int,
        place: Place, on_error: Literal["error", "skip"],
    ) -> None:  # fmt: skip
        if source.labels is None:
            raise UserError(f"data.root: the 20-NN probe needs labels, found {source.description}")
        if queries is not None and queries.classes != source.classes:
            raise UserError(
                f"data.probe_root: has {_classes(queries)}, data.root has {_classes(source)}; "
                "use the test split of the same data, labelled alike"
            )
        order = epoch_order(len(source), seed=_SPLIT_SEED, epoch=0)
        if queries is None:
            size = min(run.probe_queries, len(source) // 4)
            self._queries, query_ids, order = source, order[:size], order[size:]
        else:
            self._queries = queries
            query_ids = epoch_order(len(queries), seed=_SPLIT_SEED, epoch=0)[: run.probe_queries]
        self._source, self._bank_ids, self._query_ids = source, order[: run.probe_bank], query_ids
        self._bad = {each: BadImages(each, on_error) for each in (self._source, self._queries)}
        self._image_size, self._batch_size, self._place = image_size, batch_size, place
        held_out = "held out of training" if queries is not None else "of the training set, their labels unused"
        self.description = (
            f"20-NN probe: {len(self._bank_ids):,} training images answer for {len(query_ids):,} images {held_out}"
        )
        self.chance = 1 / len(source.classes)

    def accuracy(self, encoder: nn.Module) -> float:
        """Return the top-1 accuracy in [0, 1] of the encoder's mean embeddings. Collective: ranks share the images."""
        bank, bank_labels = self._embed(encoder, self._source, self._bank_ids)
        queries, query_labels = self._embed(encoder, self._queries, self._query_ids)
        return knn_accuracy(bank, bank_labels, queries, query_labels, k=NEIGHBOURS)

    @torch.no_grad()
    def _embed(self, encoder: nn.Module, source: Mixture, ids: np.ndarray) -> tuple[Tensor, Tensor]:
        # All ranks must call a sharded encoder equally often, so the first images repeat where they do not divide.
        share = -(-len(ids) // world_size())
        mine = np.resize(ids, share * world_size())[self._place.rank * share : (self._place.rank + 1) * share]
        views = center_batches(source, mine, self._image_size, self._batch_size, self._place, self._bad[source])
        features = torch.cat([encoder(view).float().mean(dim=1) for view in views])
        assert source.labels is not None
        labels = torch.from_numpy(source.labels[ids]).to(features.device)
        return gather_rows(features)[: len(ids)], labels


def _classes(source: Mixture) -> str:
    named = [printable(name) for name in source.classes[:3]] + ["..."] * (len(source.classes) > 3)
    return f"{len(source.classes):,} classes ({', '.join(named)})" if named else "no labels"
