"""Two short runs on a GPU that is lent by the minute: the kernels (`first`), then the engine (`engine`)."""
