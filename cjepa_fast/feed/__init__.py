"""Images: what there is (sources, shards, images, index, manifest), what is shown when (order, views), decoding."""
