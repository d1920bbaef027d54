"""The operator as Triton kernels, for NVIDIA and AMD GPUs.  :mod:`.launch` is the entry and tells the stages."""
