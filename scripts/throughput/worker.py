"""One contender in its own process: prepares, then does rounds when told to over stdin.

Commands, one a line: ``go SECONDS`` runs steps for about so long and answers with images and seconds;
``peak`` measures a matrix product; ``stop`` ends. Answers are one line of JSON each on stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from throughput.case import Case, NotAvailableError, measure_peak, peak_memory_mib

MODULES = {"ours": "ours", "torch": "torch_peer", "keras": "keras_peer"}


def main() -> None:
    case = Case.from_json(sys.argv[1])
    # frameworks print to stdout as they please; answers go to a descriptor of their own
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        module = importlib.import_module(f"throughput.{MODULES[case.system.split('-')[0]]}")
        contender = module.make(case)
        start = time.perf_counter()
        contender.run(1)
        first = time.perf_counter() - start
        contender.run(2)
    except NotAvailableError as error:
        answer(error=str(error))
        return
    except Exception as error:  # a peer that cannot run a case is a line in the table
        answer(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return
    start = time.perf_counter()
    contender.run(2)
    seconds_per_step = (time.perf_counter() - start) / 2
    answer(ready=True, first_step_seconds=first, **contender.facts)
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "stop":
            break
        if command == "peak":
            answer(gflops=measure_peak(contender.matmul()))
        elif command == "go":
            steps = max(2, round(float(rest[0]) / seconds_per_step))
            start = time.perf_counter()
            contender.run(steps)
            seconds = time.perf_counter() - start
            seconds_per_step = seconds / steps
            answer(images=steps * case.batch, seconds=seconds, peak_memory_mib=peak_memory_mib())


if __name__ == "__main__":
    main()
