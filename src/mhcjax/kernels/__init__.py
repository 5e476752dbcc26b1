"""Raw array operations behind `connections`: arrays in, arrays out, no specification."""

from mhcjax.kernels.xla import read, write

__all__ = ["read", "write"]
