"""The C++ library (`host`) and the CUDA library (`cuda`); `build` finds, builds and loads both."""
