"""One run on a GPU: its ceilings, measured first, and its records, written as they come."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import records, timing
from bench.records import Ceilings, Record
from bench.workers import turn
from pallas_kernels.arch import Arch

type Maker = Callable[[Ceilings, str], Record]

# Also into a file: what a run that is ended early has said stands beside its records.
at_once: Callable[[str], None] = functools.partial(print, flush=True)


class Session:
    """Where figures of one run go; what was kept stays if a later case fails or the time runs out."""

    def __init__(
        self, arch: Arch, results: Path, say: Callable[[str], None] = at_once, offered: Path | None = None
    ) -> None:
        """Joins the session that was offered, or brings the clocks up and measures the ceilings of its own.

        The matmul comes first, the copies after it let the GPU cool.
        """
        self.arch, self.folder, self.say = arch, results / records.gpu_folder(arch), say
        self.wrong: list[str] = []
        self.shared = offered
        if offered:
            content = json.loads(offered.read_text())
            self.ceilings, self.environment = Ceilings(**content["ceilings"]), content["environment"]
        else:
            timing.raise_clocks()
            matmul = timing.matmul_rate()
            timing.raise_clocks()
            self.ceilings = Ceilings(timing.copy_bandwidth(), matmul)
            self.environment = records.environment(arch, self.ceilings)
            known = f" (known {arch.copy_bandwidth / 1e12:.2f})" if arch.copy_bandwidth else ""
            say(f"copy {self.ceilings.copy / 1e12:.3f} TB/s{known}, bf16 matmul {matmul / 1e12:.0f} TFLOP/s")
        self.name = f"{self.environment['date']} {self.environment['sources']}"

    def offer(self, file: Path) -> Path:
        """Writes what workers need to join this session."""
        file.write_text(json.dumps({"ceilings": dataclasses.asdict(self.ceilings), "environment": self.environment}))
        return file

    def turn(self) -> contextlib.AbstractContextManager[None]:
        """While it is entered, the GPU and the records are this process's own."""
        return turn(self.shared) if self.shared else contextlib.nullcontext()

    def keep(self, makers: Sequence[Maker]) -> list[Record]:
        """Makes, writes and returns the records of some timings."""
        made = [make(self.ceilings, self.name) for make in makers]
        with self.turn():
            records.save(self.folder, made, self.environment)
        return made

    def refuse(self, text: str) -> None:
        """Notes a result that was wrong and is not reported."""
        self.wrong.append(text)
        self.say(f"WRONG, not reported: {text}")

    def status(self) -> int:
        """Says where the records are and what was wrong; 1 where anything was."""
        self.say(f"records are in {self.folder}")
        for text in self.wrong:
            self.say(f"WRONG, not reported: {text}")
        return 1 if self.wrong else 0
