"""The feed: from files to batches of images.

Indexing: sources, listing, shards, images, scan, manifest, index. Training: mixture, order, views, read, decode, bad,
batches.
"""
