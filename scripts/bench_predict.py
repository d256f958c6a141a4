"""Images/s of prediction (uint8 batch in, probabilities out) here and in other frameworks.

    python scripts/bench_predict.py --peers torch,keras --output predict

Measured and reported as in bench_train.
"""

from throughput.rounds import main

if __name__ == "__main__":
    main("predict", __doc__.splitlines()[0], batches=[256])
