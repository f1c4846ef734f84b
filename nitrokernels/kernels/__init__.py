"""Kernels and launchers of the ops whose one file would be too long with them."""
