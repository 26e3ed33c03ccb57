"""A process of clients: `python -m chaos.processes.client NAME '{…}'`, told what to do by lines.

On its standard input: `stop` (no more writes), `finish {"0": 123}` (readers go on to these ends,
then the process ends). On its standard output: `writing`, once a first write was acknowledged, and
`stopped`, once every write has an outcome.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any

from aegis_cluster.node.orphans import die_with_parent
from chaos.processes.banking import audit, handle_orders, tell
from chaos.processes.injection import install
from chaos.processes.recording import Recorder
from chaos.processes.schedule import TRANSACTIONS
from chaos.processes.sharing import share
from chaos.processes.workloads import (
    Client,
    add_unique_ids,
    dequeue,
    enqueue,
    guarded,
    watch,
)

READER_LIFE_S = 12.0
MEMBERS = 2
"""Of the consumer group, in each process."""


async def run(options: dict[str, Any], recorder: Recorder) -> None:
    """Until told to finish."""
    client = Client(
        name=options["name"],
        bootstrap=options["bootstrap"],
        partitions=options["partitions"],
        recorder=recorder,
        rng=random.Random(options["seed"]),
    )
    pause_s: float = options["pause_s"]
    has_transactions = options["workload"] == TRANSACTIONS
    client.refusals_are_certain = not has_transactions
    if options["workload"] == "unique-ids":
        writers = [add_unique_ids(client, pause_s)]
    else:
        writers = [enqueue(client, pause_s) for _ in range(1 if has_transactions else 3)]
    if has_transactions:
        writers.append(tell(client, pause_s))
    loop = asyncio.get_running_loop()
    aside = [loop.create_task(_listen(client)), loop.create_task(_tell(client))]
    async with asyncio.TaskGroup() as tasks:
        for reader_life_s in (READER_LIFE_S, float("inf")):
            tasks.create_task(guarded(client, dequeue(client, reader_life_s)))
        if options["workload"] == "queue":
            for _ in range(MEMBERS):
                tasks.create_task(guarded(client, share(client)))
        if has_transactions:
            for number in range(MEMBERS):
                name = f"{options['party']}-{number}"
                tasks.create_task(guarded(client, handle_orders(client, name)))
            tasks.create_task(guarded(client, audit(client)))
        tasks.create_task(guarded(client, watch(client)))
        async with asyncio.TaskGroup() as writing:
            for writer in writers:
                writing.create_task(guarded(client, writer))
        print("stopped", flush=True)
    for task in aside:
        task.cancel()


async def _tell(client: Client) -> None:
    await client.acknowledged.wait()
    print("writing", flush=True)


async def _listen(client: Client) -> None:
    """Obey the lines; where there are no more, the run is gone."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := (await reader.readline()).decode():
        word, _, rest = line.strip().partition(" ")
        client.stopping.set()
        if word == "finish":
            client.ends.set_result({int(key): end for key, end in json.loads(rest).items()})


def main() -> int:
    """Run one group of clients."""
    options = json.loads(sys.argv[1])
    die_with_parent(options["parent"])
    install(options["party"])
    recorder = Recorder(Path(options["directory"]), options["name"])
    asyncio.run(run(options, recorder))
    recorder.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
