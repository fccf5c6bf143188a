"""Who computes what of a triangle of tiles: stream-K (Osama et al., arXiv:2301.03598) for the Gram kernel."""

from functools import cache
from typing import NamedTuple

import torch

from gfwsvd_kernels.tiles import Target, Tile

LEAST_STEPS = 8  # of tokens that are worth the addition of a tile to memory
ADDITION_STEPS = 8  # that a program could multiply while it adds a tile


class Plan(NamedTuple):
    """Who computes what of the (tile, step) pairs of a triangle: stream-K, but programs keep to the same tokens.

    A program owns `waves` whole tiles. The `rest` of the tiles, fewer than there are programs, are cut: first each tile
    into as many blocks of `share` steps as it holds, one a program, then what is left, the last steps of all these
    tiles in a row, into ranges of `span` steps that may cross from tile to tile. But for these last steps, programs
    that run at the same time read the same tokens, so that x comes from memory about once. Ranges across whole tiles
    would start anywhere: D = 1024 would read a long x from memory seven times.
    """

    programs: int
    waves: int
    rest: int
    steps: int
    share: int
    span: int

    @property
    def longest(self) -> int:
        """Steps of the busiest program."""
        return self.waves * self.steps + (self.share if self.rest else 0)

    def segments(self, program: int) -> list[tuple[int, int, int]]:
        """What a program does, in its order: tiles, and of each the first step and how many."""
        found = [(wave * self.programs + program, 0, self.steps) for wave in range(self.waves)]
        shared_from = self.waves * self.programs
        blocks_of_a_tile, tail = divmod(self.steps, self.share)
        num_blocks = blocks_of_a_tile * self.rest
        if program < num_blocks:
            return [*found, (shared_from + program % self.rest, program // self.rest * self.share, self.share)]
        begin = (program - num_blocks) * self.span
        end = min(begin + self.span, self.rest * tail)
        while begin < end:
            nth, skipped = divmod(begin, tail)
            count = min(tail - skipped, end - begin)
            found.append((shared_from + nth, self.steps - tail + skipped, count))
            begin += count
        return found


@cache
def plan(num_tiles: int, steps: int, programs: int) -> Plan:
    """For at most so many programs: the rest in equal shares, or each of its tiles in equally many parts.

    Equal shares are shorter, but ranges that cross tiles are added to memory once a tile, and nobody multiplies in the
    meantime.
    """
    waves, rest = divmod(num_tiles, programs)
    if not rest:
        return Plan(programs, waves, 0, steps, steps, steps)
    least = min(LEAST_STEPS, steps)
    share = max(-(-rest * steps // programs), least)
    part = max(-(-steps // (programs // rest)), least)
    tail = steps % share
    additions = -(-share // tail) + 1 if tail and share != tail else 1
    span = share
    if part + ADDITION_STEPS <= share + ADDITION_STEPS * additions:
        share, tail = part, steps % part
        span = tail or share
    needed = steps // share * rest + -(-rest * tail // span)
    return Plan(programs if waves else needed, waves, rest, steps, share, span)


def gram_plan(tile: Tile, target: Target, num_tokens: int, width: int) -> Plan:
    """In deterministic mode every tile of `out` has one program, and nothing depends on the number of SMs."""
    num_tiles = tile.in_triangle(width)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return plan(num_tiles, -(-num_tokens // tile.depth), num_tiles if deterministic else target.num_sms * tile.per_sm)
