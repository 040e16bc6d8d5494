"""The objectives that can be trained."""
