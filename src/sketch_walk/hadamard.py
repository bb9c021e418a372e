"""Feature-space sketch: the seeded, subsampled randomized Hadamard transform (SRHT)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float


def next_power_of_two(n: int) -> int:
    """Smallest power of two that is at least `n` (n >= 1)."""
    return 1 << (n - 1).bit_length()


def fast_walsh_hadamard(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Orthonormal Walsh-Hadamard transform over the last dimension, n log n additions.

    Parameters
    ----------
    x : torch.Tensor
        Shape (..., n), floating point, n a power of two.

    Returns
    -------
    torch.Tensor
        Same shape and dtype; applying it twice gives `x` back.

    Raises
    ------
    ValueError
        If n is no power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"the last dimension of x must be a power of two, got {n}")
    shape, half = x.shape, 1
    while half < n:
        pairs = x.unflatten(-1, (n // (2 * half), 2, half))
        left, right = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((left + right, left - right), dim=-2).reshape(shape)
        half *= 2
    return x / math.sqrt(n)


def sketch_width(head_dim: int, sketch_dim: int) -> int:
    """Coordinates that a sketch really has: `sketch_dim`, but never more than `head_dim`."""
    return min(head_dim, sketch_dim)


class HadamardTransform(nn.Module):
    """x -> sqrt(n/r) · P·H·D·x: random signs D, orthonormal Hadamard H, a sample P of r coordinates without
    replacement.

    Inner products are kept in expectation, E<x̃, ỹ> = <x, y>; exactly so when ``sketch_dim >= head_dim``, where the
    transform is an orthonormal rotation of ``head_dim`` coordinates and a larger `sketch_dim` buys nothing (the output
    has ``min(head_dim, sketch_dim)`` coordinates). Head dimensions that are no powers of two are zero-padded to n
    inside; their exact rotation applies H to each power-of-two part of the head dimension (80 = 64 + 16), which needs
    no padding.

    Signs and coordinates are drawn on the CPU from `seed`: identical on every device and in every dtype.

    Parameters
    ----------
    head_dim : int
        d, size of the last dimension of the input.
    sketch_dim : int
        r, wanted size of the last dimension of the output.
    seed : int
        Seed of D and P.

    Raises
    ------
    ValueError
        If `head_dim` or `sketch_dim` is below 1.
    """

    signs: Tensor
    coordinates: Tensor

    def __init__(self, head_dim: int, sketch_dim: int, seed: int = 42) -> None:
        super().__init__()
        for name, value in (("head_dim", head_dim), ("sketch_dim", sketch_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.head_dim = head_dim
        self.sketch_dim = sketch_width(head_dim, sketch_dim)
        self.is_rotation = sketch_dim >= head_dim
        self.padded_dim = head_dim if self.is_rotation else next_power_of_two(head_dim)
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (head_dim,), generator=generator) * 2 - 1
        sample = torch.randperm(self.padded_dim, generator=generator)[: self.sketch_dim].sort().values
        self.register_buffer("signs", signs.to(torch.int8), persistent=False)
        self.register_buffer("coordinates", sample, persistent=False)

    def forward(self, x: Float[Tensor, "*batch head_dim"]) -> Float[Tensor, "*batch sketch_dim"]:
        """Sketch the last dimension of `x`; dtype and leading shape are kept.

        Raises
        ------
        ValueError
            If the last dimension is not `head_dim`.
        """
        if x.shape[-1] != self.head_dim:
            raise ValueError(f"x must have a last dimension of head_dim = {self.head_dim}, got {x.shape[-1]}")
        x = x * self.signs.to(x.device, x.dtype)
        if self.is_rotation:
            return torch.cat([fast_walsh_hadamard(part) for part in x.split(_binary_parts(self.head_dim), -1)], -1)
        padded = nn.functional.pad(x, (0, self.padded_dim - self.head_dim))
        sampled = fast_walsh_hadamard(padded).index_select(-1, self.coordinates.to(x.device))
        return sampled * math.sqrt(self.padded_dim / self.sketch_dim)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"head_dim={self.head_dim}, sketch_dim={self.sketch_dim}, rotation={self.is_rotation}"


def sketch_matrix(
    head_dim: int, sketch_dim: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "head_dim sketch_dim"]:
    """`HadamardTransform` as one matrix: at the head dimensions of attention one product beats log n passes."""
    return _sketch_matrix(head_dim, sketch_dim, seed, device, dtype)


@lru_cache(maxsize=64)
def _sketch_matrix(head_dim: int, sketch_dim: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        identity = torch.eye(head_dim, dtype=torch.float64)
        return HadamardTransform(head_dim, sketch_dim, seed)(identity).to(device, dtype)


def _binary_parts(n: int) -> list[int]:
    """Powers of two that sum to `n`, largest first."""
    return [1 << bit for bit in reversed(range(n.bit_length())) if n >> bit & 1]
