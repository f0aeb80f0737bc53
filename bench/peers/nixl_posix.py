"""NIXL's POSIX backend (io_uring) on one file with O_DIRECT: a figure beside our SSD tier. No checksums.

usage: nixl_posix.py read|write --dir DIR --bytes N --depth N --seconds S --total BYTES
"""

import mmap
import os
import time
from ctypes import addressof, c_char

os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")

from nixl._api import nixl_agent, nixl_agent_config
from peer import arguments, report


def main() -> None:
    args = arguments()
    # The file that fio laid out and wrote: both move the same bytes of the disk.
    fd = os.open(os.path.join(args.dir, "fio.dat"), os.O_RDWR | os.O_DIRECT)
    memory = mmap.mmap(-1, args.bytes * args.depth)
    memory.write(os.urandom(1 << 20) * (len(memory) >> 20))
    base = addressof(c_char.from_buffer(memory))

    agent = nixl_agent("bench", nixl_agent_config(backends=[]))
    agent.create_backend("POSIX", {"use_uring": "true"})
    agent.register_memory([(base, len(memory), 0, "")], "DRAM")
    agent.register_memory([(0, args.total, fd, "")], "FILE")

    def request(lane: int, record: int):
        offset = record * args.bytes % (args.total // args.bytes * args.bytes)
        here = agent.get_xfer_descs([(base + lane * args.bytes, args.bytes, 0)], "DRAM")
        there = agent.get_xfer_descs([(offset, args.bytes, fd)], "FILE")
        handle = agent.initialize_xfer(args.way.upper(), here, there, "bench")
        if agent.transfer(handle) == "ERR":
            raise SystemExit("a transfer was refused")
        return handle

    def move() -> int:
        began = time.perf_counter()
        lanes = {lane: request(lane, lane) for lane in range(args.depth)}
        following, moved = args.depth, 0
        while lanes:
            for lane, handle in list(lanes.items()):
                state = agent.check_xfer_state(handle)
                if state == "ERR":
                    raise SystemExit("a transfer failed")
                if state != "DONE":
                    continue
                agent.release_xfer_handle(handle)
                moved += args.bytes
                if time.perf_counter() - began < args.seconds:
                    lanes[lane] = request(lane, following)
                    following += 1
                else:
                    del lanes[lane]
        return moved

    report(move)


main()
