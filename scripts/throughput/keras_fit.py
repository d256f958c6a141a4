"""Keras `fit` on folders of PNG files, an epoch for each line on stdin; answers images/s of each on stdout.

python scripts/throughput/keras_fit.py FOLDER NET BATCH generator|dataset

The readers are those of the notebooks: tf.keras's ImageDataGenerator and image_dataset_from_directory.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
MISSING = 3
"""Exit code where Keras or TensorFlow is not installed."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # frameworks print to stdout as they please
    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import keras
        import tensorflow as tf
    except ImportError:
        sys.exit(MISSING)

    from throughput.keras_peer import build

    folder, name, batch, reader = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    side = 96
    if reader == "generator":
        data = tf.keras.preprocessing.image.ImageDataGenerator().flow_from_directory(
            folder, target_size=(side, side), class_mode="binary", batch_size=batch, seed=0
        )
    else:
        data = keras.utils.image_dataset_from_directory(
            folder, label_mode="binary", batch_size=batch, image_size=(side, side), shuffle=True, seed=0
        )
    model = build(keras, name, side)
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        jit_compile=False,
    )
    count = sum(1 for _ in folder.glob("*/*.png"))
    for _ in sys.stdin:
        began = time.perf_counter()
        model.fit(data, epochs=1, verbose=0)
        print(count / (time.perf_counter() - began), file=answers, flush=True)


if __name__ == "__main__":
    main()
