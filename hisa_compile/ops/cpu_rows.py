"""What a chunk of rows sees on the CPU: windows, valid keys, mask and segments, by token and by block."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from .visibility import Visibility


class Rows:
    """A chunk of rows: where they are in the batch, and which tokens they see."""

    def __init__(self, rows: Tensor, q: Tensor, tokens: int, visibility: Visibility) -> None:
        batch, queries = q.shape[:2]
        self.batch = rows // queries
        self.query = rows % queries
        self.tokens = tokens
        self.windowed = visibility.window_start is not None or visibility.window_end is not None
        self.key_valid = visibility.key_valid
        self.mask = None if visibility.mask is None else visibility.mask.expand(batch, queries, tokens)
        self.k_segment, self.segment = visibility.k_segment, None
        if visibility.q_segment is not None:
            self.segment = visibility.q_segment.expand(batch, queries)[self.batch, self.query]
        self.start = self._window(visibility.window_start, 0, (batch, queries))
        self.end = self._window(visibility.window_end, tokens, (batch, queries))

    def _window(self, window: Tensor | None, default: int, shape: tuple[int, int]) -> Tensor:
        if window is None:
            return torch.full_like(self.batch, default)
        return window.expand(shape)[self.batch, self.query].long().clamp(0, self.tokens)

    def __getitem__(self, chosen: Tensor) -> Rows:
        part = copy(self)
        part.batch, part.query = self.batch[chosen], self.query[chosen]
        part.start, part.end = self.start[chosen], self.end[chosen]
        part.segment = None if self.segment is None else self.segment[chosen]
        return part

    def spans(self, size: int = 1) -> list[list[int]]:
        """First and last + 1 token of each row's window, in units of ``size`` tokens."""
        return torch.stack((self.start // size, (self.end + size - 1) // size), -1).tolist()

    def sees(self, positions: Tensor) -> Tensor:
        """Visible or not at ``positions`` [R, N]; a position past the last token is not."""
        visible = (positions >= self.start[:, None]) & (positions < self.end[:, None])
        inside = positions.clamp_max(self.tokens - 1)
        if self.key_valid is not None:
            visible &= self.key_valid[self.batch[:, None], inside]
        if self.mask is not None:
            visible &= self.mask[self.batch[:, None], self.query[:, None], inside]
        if self.k_segment is not None and self.segment is not None:
            visible &= self.k_segment[self.batch[:, None], inside] == self.segment[:, None]
        return visible

    def sees_all(self) -> Tensor:
        """Visible or not for every token, [R, T]."""
        if self.windowed:
            positions = torch.arange(self.tokens, device=self.batch.device)
            visible = (positions >= self.start[:, None]) & (positions < self.end[:, None])
        else:
            visible = self.batch.new_ones((self.batch.shape[0], self.tokens), dtype=torch.bool)
        if self.key_valid is not None:
            visible &= self.key_valid[self.batch]
        if self.mask is not None:
            visible &= self.mask[self.batch, self.query]
        if self.k_segment is not None and self.segment is not None:
            # By batch entry: a copy of the ids for each row would be larger than all else here.
            entries, counts = self.batch.unique_consecutive(return_counts=True)
            parts = zip(visible.split(counts.tolist()), self.segment.split(counts.tolist()), strict=True)
            for entry, (seen, segment) in zip(entries.tolist(), parts, strict=True):
                seen &= self.k_segment[entry] == segment[:, None]
        return visible

    def sees_in_blocks(
        self, block_size: int, blocks: int, bounds: tuple[Tensor, Tensor] | None, at_once: int
    ) -> Tensor:
        """The eligible blocks, [R, M]: those that hold a visible token.

        ``bounds``, see :func:`segment_bounds`, are used where there is no mask: then only blocks that they and the
        window leave open are looked into, some ``at_once`` tokens at a time.
        """
        if self.mask is not None or (self.key_valid is not None and bounds is None):
            padding = blocks * block_size - self.tokens
            visible = torch.nn.functional.pad(self.sees_all(), (0, padding))
            return visible.view(-1, blocks, block_size).any(-1)
        first = torch.arange(blocks, device=self.batch.device) * block_size
        start, end = self.start[:, None], self.end[:, None]
        eligible = (first + block_size > start) & (first < end) & (start < end)
        if bounds is None or self.segment is None:
            return eligible
        low, high = (bound[self.batch] for bound in bounds)
        segment = self.segment[:, None]
        eligible &= (low <= segment) & (segment <= high)
        # Both bounds are segments of valid keys, so a window that holds the whole block holds these keys.
        sure = (low == segment) | (high == segment)
        sure &= (first >= start) & ((first + block_size).clamp_max(self.tokens) <= end)
        if self.key_valid is None:
            sure |= low == high
        inside = torch.arange(block_size, device=self.batch.device)
        for unsure in (eligible & ~sure).nonzero().split(max(1, at_once // block_size)):
            row, block = unsure.unbind(1)
            eligible[row, block] = self[row].sees(block[:, None] * block_size + inside).any(-1)
        return eligible


def segment_bounds(k_segment: Tensor, block_size: int, key_valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least and greatest segment of each block's valid keys, both [B, M]; least > greatest where it has none."""
    batch, tokens = k_segment.shape
    blocks = -(-tokens // block_size)
    limits = torch.iinfo(k_segment.dtype)
    low, high = (k_segment.new_empty(batch, blocks) for _ in range(2))
    for entry in range(batch):
        for bound, reduce, spare in ((low, torch.amin, limits.max), (high, torch.amax, limits.min)):
            ids = k_segment.new_full((blocks * block_size,), spare)
            own = k_segment[entry]
            ids[:tokens] = own if key_valid is None else own.masked_fill(~key_valid[entry], spare)
            bound[entry] = reduce(ids.view(blocks, block_size), 1)
    return low, high
