"""The C++ library (host) and the CUDA library (cuda): found, or built once, and loaded."""
