"""A matrix of the base that is held in 8 or 4 bits: codes, and scales of its rows or of groups of their channels.

A weight is code x scale. Codes are whole numbers (int8), FP8 e4m3, or whole numbers of 4 bits; all are exact in
bfloat16 and in float16, so a product is one of 16-bit numbers whose float32 sums are multiplied with the scales.

Codes of 4 bits have a scale for each `GROUP` channels of a row, and lie in pairs: byte b of a group has its channel b
in the low bits and its channel b + 64 in the high ones, both plus 8. So the channels of each half follow one another.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.errors import ConfigError
from meswitch.ops.backend import KERNEL_DTYPES, chosen_backend
from meswitch.quantised import GROUP

CODE_DTYPES = (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix in 8 or 4 bits.

    Args:
        codes: [rows, in_features] int8 or float8_e4m3fn, without NaN; or [rows, in_features / 2] uint8, pairs of 4
            bits. Contiguous.
        scale: [rows] float32; of pairs [groups, rows]. Contiguous, on the same device.

    Raises:
        ConfigError: other shapes or dtypes.
    """

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        codes, scale = self.codes, self.scale
        if codes.dim() != 2 or codes.dtype not in (*CODE_DTYPES, torch.uint8) or not codes.is_contiguous():
            raise ConfigError(
                f"codes: {tuple(codes.shape)} {codes.dtype}: a contiguous matrix of int8, float8_e4m3fn or uint8 is "
                "taken"
            )
        rows, width = self.shape
        if self.is_paired and width % GROUP:
            raise ConfigError(f"codes: rows of {width} channels: pairs of 4 bits are taken in groups of {GROUP}")
        wanted = (width // GROUP, rows) if self.is_paired else (rows,)
        if scale.shape != wanted or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise ConfigError(f"scale: {tuple(scale.shape)} {scale.dtype}: {wanted} float32 is taken, contiguous")

    @classmethod
    def paired(cls, codes: Tensor, scale: Tensor) -> "Codes":
        """Codes of 4 bits, as they are held.

        Args:
            codes: [rows, in_features] int8, -8 to 7.
            scale: [rows, groups] float32.
        """
        rows, width = codes.shape
        halves = (codes + 8).view(torch.uint8).view(rows, -1, 2, GROUP // 2)
        return cls((halves[:, :, 0] | halves[:, :, 1] << 4).view(rows, width // 2), scale.T.contiguous())

    @property
    def is_paired(self) -> bool:
        """Whether a byte is two codes of 4 bits."""
        return self.codes.dtype == torch.uint8

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, in_features]."""
        rows, width = self.codes.shape
        return rows, 2 * width if self.is_paired else width

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def numbers(self) -> Tensor:
        """[rows, in_features] float32: the codes, unpacked."""
        if not self.is_paired:
            return self.codes.float()
        halves = self.codes.view(len(self.codes), -1, 1, GROUP // 2)
        return torch.cat([halves & 15, halves >> 4], 2).view(self.shape).float() - 8

    def scales(self) -> Tensor:
        """[rows, 1] or [rows, in_features] float32: what each code is multiplied with."""
        return self.scale.T.repeat_interleave(GROUP, 1) if self.is_paired else self.scale[:, None]

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
            raise ConfigError(f"out: {tuple(out.shape)}: a contiguous matrix of {self.shape} is written")
        if chosen_backend(backend, out.device, "dequantise") != "triton":
            return out.copy_(self.numbers().mul_(self.scales()))
        if out.dtype not in KERNEL_DTYPES:
            raise ConfigError(
                f"out: {out.dtype}: the triton backend writes bfloat16 or float16; the backend 'reference' writes any"
            )
        from meswitch.ops.triton.codes import dequantise

        dequantise(self, out)
        return out
