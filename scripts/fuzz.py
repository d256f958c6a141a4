"""Feed damaged files to every parser for as long as one likes: no crash, no hang, no unbounded memory.

    python scripts/fuzz.py --seconds 600
    python scripts/fuzz.py --only zip,tif --seconds 60
    pip install atheris && python scripts/fuzz.py --engine atheris --seconds 3600

Each parser may return, or refuse with the errors that it documents; anything else, an input that takes longer than
--limit seconds, and one that needs more than --memory MiB beyond the start, are findings. Each finding is written
into --findings, and the exit code is 1. The engine of our own needs nothing and changes bytes, numbers and lines of
sound files; atheris is guided by the branches that an input reaches.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuzzing.targets import Target


class TooSlow(BaseException):
    """An input took too long; no parser may catch it."""


WORDS = [
    b"\0",
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"nan",
    b"-1",
    b"1e999",
    b"9" * 30,
    b'"',
    b"{",
    b"[" * 3000,
]
WORDS += [
    b"]",
    b"}",
    b",",
    b"\r\n",
    b"\n",
    b"=",
    b"true",
    b"null",
    b"\xef\xbb\xbf",
    b"../",
    b"PK\1\2",
    "é".encode(),
]


def mutated(seed: bytes, chance: random.Random) -> bytes:
    """A sound file with a few things changed."""
    content = bytearray(seed)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
        at = chance.randrange(len(content) + 1)
        until = min(len(content), at + chance.choice((1, 1, 2, 4, 8, 64)))
        kind = chance.randrange(6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[at:until] = chance.randbytes(until - at)
        elif kind == 2:
            content[at:until] = chance.choice(WORDS)
        elif kind == 3:
            del content[at:until]
        elif kind == 4:
            content[at:at] = content[at:until] * chance.choice((1, 2, 50))
        elif chance.random() < 0.3:
            del content[at:]
    return bytes(content)


@contextlib.contextmanager
def bounded(seconds: float) -> Any:
    """Raise `TooSlow` in the block after some seconds."""

    def late(signum: int, frame: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(target: Target, content: bytes, folder: Path, limit: float) -> str:
    """What is wrong with how a parser takes an input, or an empty string."""
    try:
        with bounded(limit):
            target.parse(content, folder)
    except target.refusals as refusal:
        text = str(refusal)
        return f"a refusal of several lines: {text!r}" if "\n" in text and len(text.splitlines()) > 3 else ""
    except TooSlow:
        return f"more than {limit:g} seconds"
    except MemoryError:
        return "unbounded memory"
    except Exception:
        return traceback.format_exc()
    return ""


def short(wrong: str, lines: int = 12) -> str:
    """The end of a traceback, which may be of thousands of lines."""
    return "\n".join(wrong.rstrip().splitlines()[-lines:])


def limit_memory(mebibytes: int) -> None:
    """Let this process take that much more address space than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def fuzz(name: str, target: Target, options: argparse.Namespace) -> int:
    """Try a parser with our own engine; returns the number of findings."""
    chance, tried, kinds = random.Random(f"{options.seed}-{name}"), 0, set[str]()
    deadline = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        for seed in target.seeds:  # whoever refuses a sound file proves nothing by refusing others
            target.parse(seed, Path(folder))
        while time.monotonic() < deadline and (not options.count or tried < options.count):
            content = mutated(chance.choice(target.seeds), chance)
            tried += 1
            wrong = attempt(target, content, Path(folder), options.limit)
            last = wrong.strip().splitlines()[-1] if wrong else ""
            if wrong and last not in kinds:
                kinds.add(last)
                options.findings.mkdir(parents=True, exist_ok=True)
                path = options.findings / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}"
                path.write_bytes(content)
                print(f"{name}: {path}\n{short(wrong)}", flush=True)
    print(f"{name}: {tried:,} inputs, {len(kinds)} kinds of findings", flush=True)
    return len(kinds)


def fuzz_with_atheris(name: str, target: Target, options: argparse.Namespace) -> int:
    """Try a parser with atheris, which ends the process that it runs in; returns whether it found something."""
    options.findings.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--inside-atheris", name, "--limit", str(options.limit)]
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds):
            Path(corpus, str(number)).write_bytes(seed)
        flags = [corpus, f"-max_total_time={options.seconds:g}", f"-rss_limit_mb={options.memory + 1000}"]
        flags += [
            f"-artifact_prefix={options.findings}/{name}-",
            f"-seed={options.seed + 1}",
            "-max_len=4096",
        ]
        return int(subprocess.run([*command, "--", *flags]).returncode != 0)


def inside_atheris(name: str, limit: float, flags: list[str]) -> None:
    """Hand a parser over to atheris."""
    import atheris

    with atheris.instrument_imports(include=["pcam_jax.data", "pcam_jax.run", "pcam_jax.config"]):
        from fuzzing.targets import make_targets

        target = make_targets()[name]
    folder = Path(tempfile.mkdtemp())

    def once(content: bytes) -> None:
        if wrong := attempt(target, content, folder, limit):
            raise RuntimeError(wrong)

    atheris.Setup([sys.argv[0], *flags], once)
    atheris.Fuzz()


def main() -> int:
    """Fuzz, and say what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="over all parsers")
    parser.add_argument("--count", type=int, default=0, help="inputs of each parser at most")
    parser.add_argument("--only", default="", help="parsers, by commas; by default all")
    parser.add_argument("--engine", choices=("own", "atheris"), default="own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=10, help="seconds for one input")
    parser.add_argument("--memory", type=int, default=1024, help="MiB that parsing may take beyond the start")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--inside-atheris", default="", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # before the parsers import jax
    if options.inside_atheris:
        inside_atheris(options.inside_atheris, options.limit, options.flags)
        return 0
    from fuzzing.targets import make_targets

    targets = make_targets()
    names = options.only.split(",") if options.only else list(targets)
    if unknown := set(names) - set(targets):
        parser.error(f"there is no parser {unknown.pop()}: {', '.join(targets)}")
    options.seconds /= len(names)
    if options.engine == "atheris":
        return int(sum(fuzz_with_atheris(name, targets[name], options) for name in names) > 0)
    limit_memory(options.memory)
    return int(sum(fuzz(name, targets[name], options) for name in names) > 0)


if __name__ == "__main__":
    sys.exit(main())
