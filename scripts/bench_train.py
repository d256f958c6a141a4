"""Images/s of a training step (uint8 batch in, forward, backward, Adam) here and in other frameworks.

    python scripts/bench_train.py --peers torch,keras --batches 32,128 --output train

Each system has a process of its own; they take turns, round by round, in one run. Medians are reported, with the
lowest and highest round, the share of the fastest float32 (or bfloat16) matrix product measured in the same run,
and the largest resident memory.
"""

from throughput.rounds import main

if __name__ == "__main__":
    main("train", __doc__.splitlines()[0], batches=[32])
