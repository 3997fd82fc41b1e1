"""From a source of examples to batches: sharded by process, shuffled, repeated, resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grain


def shard(source: Any, options: grain.sharding.ShardOptions | None = None) -> grain.MapDataset:
    """The part of a source that belongs to one process: a contiguous range of its examples.

    Args:
      source: a `grain.sources.RandomAccessDataSource`: `len(source)` and `source[index]`.
      options: None: of this JAX process; what remains of the division goes to the first processes.

    >>> options = grain.sharding.ShardOptions(shard_index=1, shard_count=3)
    >>> list(shard(range(10), options))
    [4, 5, 6]
    """
    options = grain.sharding.ShardByJaxProcess() if options is None else options
    each, extra = divmod(len(source), options.shard_count)
    extra = 0 if options.drop_remainder else extra
    start, stop = (i * each + min(i, extra) for i in (options.shard_index, options.shard_index + 1))
    return grain.MapDataset.source(source)[start:stop]


def batches(
    source: Any,
    batch: int,
    *,
    seed: int | None = None,
    epochs: int | None = None,
    transforms: Sequence[Callable[[Any], Any]] = (),
    options: grain.sharding.ShardOptions | None = None,
    drop_remainder: bool = True,
    threads: int = 0,
) -> grain.IterDataset:
    """Batches of a source, for this process.

    `iter(...)` of the result is a `grain.DatasetIterator`: its `get_state` and `set_state` make it
    resumable, and `kvjax.train.Checkpoints` saves it beside the model.

    Args:
      source: as in `shard`; its examples are pytrees of NumPy arrays of one shape each.
      batch: examples per step over all processes, a multiple of their number.
      seed: shuffles, each epoch differently; None: the order of the source.
      epochs: times through the source; None: for ever.
      transforms: pure functions of one example, applied in order.
      options: see `shard`; None: of this JAX process, with what remains dropped so that every
        process has as many batches (or kept, where `drop_remainder` is False).
      drop_remainder: leave out a last batch that is smaller: one shape, one compilation.
      threads: that prepare examples ahead; 0: none, which is quickest for cheap examples.

    Raises:
      ValueError: `batch` is no multiple of the processes, or a process has less than one batch.

    >>> [x.tolist() for x in batches(range(7), 3, epochs=1)]
    [[0, 1, 2], [3, 4, 5]]
    >>> [x.tolist() for x in batches(range(7), 3, epochs=1, drop_remainder=False)]
    [[0, 1, 2], [3, 4, 5], [6]]
    """
    if options is None:
        options = grain.sharding.ShardByJaxProcess(drop_remainder=drop_remainder)
    if batch < 1 or batch % options.shard_count:
        raise ValueError(
            f"batch={batch}: expected a positive multiple of the {options.shard_count} processes"
        )
    own = batch // options.shard_count
    data = shard(source, options)
    if drop_remainder and len(data) < own:
        raise ValueError(
            f"batch={batch}: {len(source)} examples on {options.shard_count} processes do not fill "
            "one batch"
        )
    if seed is not None:
        data = data.seed(seed).shuffle()
    if epochs != 1:
        data = data.repeat(epochs)
    for transform in transforms:
        data = data.map(transform)
    if epochs is None:  # for ever: epochs follow one another within a batch
        drop_remainder = True
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(16 * threads, 1))
    return data.to_iter_dataset(reading).batch(own, drop_remainder=drop_remainder)
