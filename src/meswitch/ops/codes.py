"""A matrix of the base that is held in 8 bits: a code a weight, and one scale a row.

A weight is code x scale of its row. Codes are whole numbers (int8) or FP8 e4m3; both are exact in bfloat16 and in
float16, so a product is one of 16-bit numbers whose float32 sums are multiplied with the scales.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops.backend import KERNEL_DTYPES, chosen_backend

CODE_DTYPES = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix in 8 bits.

    Args:
        codes: [rows, in_features] int8 or float8_e4m3fn, contiguous, without NaN.
        scale: [rows] float32, contiguous, on the same device.

    Raises:
        ConfigError: other shapes or dtypes.
    """

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        codes, scale = self.codes, self.scale
        if codes.dim() != 2 or codes.dtype not in CODE_DTYPES or not codes.is_contiguous():
            raise ConfigError(
                f"codes: {tuple(codes.shape)} {codes.dtype}: a contiguous matrix of int8 or float8_e4m3fn is taken"
            )
        if scale.shape != codes.shape[:1] or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise ConfigError(
                f"scale: {tuple(scale.shape)} {scale.dtype}: one float32 a row of {codes.shape[0]} is taken"
            )

    @property
    def shape(self) -> torch.Size:
        """[rows, in_features]."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    @property
    def is_float(self) -> bool:
        """Whether the codes are FP8."""
        return self.codes.dtype.is_floating_point

    @property
    def bytes(self) -> Tensor:
        """[rows, in_features] int8, the codes' bits."""
        return self.codes.view(torch.int8)

    def into(self, out: Tensor, backend: str | None = None) -> Tensor:
        """Write the weights that the codes stand for, each rounded once.

        Args:
            out: [rows, in_features] float32 or, as the kernels want it, bfloat16 or float16; contiguous.
            backend: `triton` or `reference`; by default triton on a GPU.

        Returns:
            out.

        Raises:
            ConfigError: another shape, or a dtype that the backend does not write.
        """
        if out.shape != self.shape or not out.is_contiguous():
            raise ConfigError(f"out: {tuple(out.shape)}: a contiguous matrix of {tuple(self.shape)} is written")
        if chosen_backend(backend, out.device, "dequantise") != "triton":
            return out.copy_(self.codes.float().mul_(self.scale[:, None]))
        if out.dtype not in KERNEL_DTYPES:
            raise ConfigError(
                f"out: {out.dtype}: the triton backend writes bfloat16 or float16; the backend 'reference' writes any"
            )
        from meswitch.ops.triton.codes import dequantise

        dequantise(self, out)
        return out
