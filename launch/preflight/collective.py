"""One rank of the preflight's collectives: whether they are right, the speed of every pair.

``python -m mm.launch.preflight.collective NODE NODES PROCESSES ADDRESS PORT LOCAL``; the first
rank of every node writes one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

ELEMENTS = 1 << 20  # float32: 4 MiB
PROBE = 1 << 16
ROUNDS = 15  # of pairs: every node meets as many others at most
TIMEOUT = timedelta(seconds=30)


def rounds(n: int) -> Iterator[list[tuple[int, int]]]:
    """Pairs of ``n`` nodes in rounds where each node is in one pair at most; all after n - 1."""
    places: list[int | None] = [*range(n), *([None] if n % 2 else [])]
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        places.insert(1, places.pop())


def main(words: list[str]) -> None:
    """Meet the others, measure, tell."""
    node, nodes, here = map(int, words[:3])
    address, port, local = words[3], int(words[4]), int(words[5])
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    rank, world = node * here + local, nodes * here
    backend, where = "nccl" if cuda else "gloo", f"tcp://{address}:{port}"
    dist.init_process_group(
        backend, init_method=where, rank=rank, world_size=world, timeout=TIMEOUT
    )

    def wait() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.monotonic()

    x = torch.full((ELEMENTS,), float(rank + 1), device=device)
    dist.all_reduce(x)
    right = bool((x == world * (world + 1) / 2).all())
    mine = torch.full((ELEMENTS // world,), float(rank), device=device)
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine)
    right = right and all(bool((part == i).all()) for i, part in enumerate(parts))
    begun = wait()
    dist.all_reduce(x)
    reduce_s = wait() - begun
    begun = wait()
    dist.all_gather(parts, mine)
    gather_s = wait() - begun

    def there_and_back(peer: int, size: int) -> float:
        """Seconds for ``size`` elements to a rank and back; the lower rank begins."""
        y = torch.ones(size, device=device)
        begun = wait()
        for turn in (0, 1):
            if (rank < peer) == (turn == 0):
                dist.send(y, peer)
            else:
                dist.recv(y, peer)
        return wait() - begun

    pairs: list[dict[str, Any]] = []
    for pairing in list(rounds(nodes))[:ROUNDS]:
        found = next((pair for pair in pairing if node in pair), None)
        if local or found is None:
            continue
        peer = (found[0] if found[1] == node else found[1]) * here
        there_and_back(peer, 1)  # connects
        probe = torch.tensor([there_and_back(peer, PROBE)], device=device)
        # both must send as much: the lower rank says
        if rank < peer:
            dist.send(probe, peer)
        else:
            dist.recv(probe, peer)
        seconds, size = float(probe), PROBE
        if seconds < 0.2:
            size = ELEMENTS
            seconds = min(there_and_back(peer, size) for _ in range(2))
        if rank < peer:
            pairs.append({"hosts": found, "rate": 2 * 4 * size / seconds})
    peers = True
    if cuda:
        others = [i for i in range(torch.cuda.device_count()) if i != local]
        peers = all(torch.cuda.can_device_access_peer(local, i) for i in others)
    dist.barrier()
    told = {
        "right": right,
        "backend": backend,
        "all_reduce": 4 * ELEMENTS / reduce_s,
        "all_gather": 4 * ELEMENTS / gather_s,
        "pairs": pairs,
        "peers": peers,
    }
    if local == 0:
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
