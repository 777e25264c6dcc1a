"""The host's part of the CUDA backend: from a call's arrays to launches on a stream."""
