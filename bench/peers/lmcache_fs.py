"""LMCache's fs_native connector (a file for each record, O_DIRECT): a figure beside our SSD tier. No checksums.

usage: lmcache_fs.py read|write --dir DIR --bytes N --depth N --seconds S --total BYTES
"""

import mmap
import os
import select
import tempfile
import time
from pathlib import Path

os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")

from lmcache.lmcache_fs import LMCacheFSClient
from peer import arguments, report

# Its default.
WORKERS = 4


class Records:
    """The newest `count` records, each with a lane of memory while it is under way."""

    def __init__(self, place: Path, count: int, size: int, depth: int) -> None:
        self.client = LMCacheFSClient(str(place), WORKERS, "", True, 0)
        self.memory = mmap.mmap(-1, size * depth)
        self.memory.write(os.urandom(1 << 20) * (len(self.memory) >> 20))
        view = memoryview(self.memory)
        self.lanes = [view[lane * size : (lane + 1) * size] for lane in range(depth)]
        self.count, self.size = count, size

    @staticmethod
    def key(number: int) -> str:
        return f"bench@1@0@{number:016x}"

    def begin(self, way: str, number: int, lane: memoryview) -> int:
        """What names its end."""
        if way == "read":
            return self.client.submit_batch_get([self.key(number % self.count)], [lane])
        # What has a name that is there is not written again. It makes room as ours does: the oldest goes.
        if number >= self.count:
            self.client.submit_batch_delete([self.key(number - self.count)])
        return self.client.submit_batch_set([self.key(number)], [lane])

    def move(self, way: str, seconds: float, most: float) -> int:
        """Bytes moved until the time is over or so many records are begun."""
        began, flying, begun, moved = time.perf_counter(), {}, 0, 0

        def go_on(lane: memoryview) -> None:
            nonlocal begun
            if begun < most and time.perf_counter() - began < seconds:
                flying[self.begin(way, begun, lane)] = lane
                begun += 1

        for lane in self.lanes:
            go_on(lane)
        event = self.client.event_fd()
        while flying:
            select.select([event], [], [])
            for future, is_good, error, each in self.client.drain_completions():
                if not is_good or not all(each or [True]):
                    raise SystemExit(f"a {way} failed: {error or 'a record is missing'}")
                # Else it tells of a record that went.
                if future in flying:
                    moved += self.size
                    go_on(flying.pop(future))
        return moved


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.dir) as place:
        count = args.total // args.bytes
        records = Records(Path(place), count, args.bytes, args.depth)
        if args.way == "read":
            records.move("write", float("inf"), count)
        report(lambda: records.move(args.way, args.seconds, float("inf")))


main()
