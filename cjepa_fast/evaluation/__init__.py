"""Figures that judge an encoder."""
