"""One run on a GPU: its ceilings, measured first, and its records, written as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench import records, timing
from bench.records import Ceilings, Record
from pallas_kernels.arch import Arch

type Maker = Callable[[Ceilings, str], Record]


class Session:
    """Where figures of one run go; what was kept stays if a later case fails or the time runs out."""

    def __init__(self, arch: Arch, results: Path, say: Callable[[str], None] = print) -> None:
        """Brings the clocks up and measures the ceilings: the matmul first, the copies after it let the GPU cool."""
        self.arch, self.folder, self.say = arch, results / records.gpu_folder(arch), say
        self.wrong: list[str] = []
        timing.raise_clocks()
        matmul = timing.matmul_rate()
        timing.raise_clocks()
        self.ceilings = Ceilings(timing.copy_bandwidth(), matmul)
        self.environment = records.environment(arch, self.ceilings)
        self.name = f"{self.environment['date']} {self.environment['sources']}"
        known = f" (known {arch.copy_bandwidth / 1e12:.2f})" if arch.copy_bandwidth else ""
        say(f"copy {self.ceilings.copy / 1e12:.3f} TB/s{known}, bf16 matmul {matmul / 1e12:.0f} TFLOP/s")

    def keep(self, makers: Sequence[Maker]) -> list[Record]:
        """Makes, writes and returns the records of some timings."""
        made = [make(self.ceilings, self.name) for make in makers]
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
