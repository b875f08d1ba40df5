"""One side of ``python -m bench ab``: a process that imports the checkout it is told to, and times steps when it is asked.

Started as a file, so that it is this one whatever the checkout holds. It answers each line of its standard input with one line of
JSON, ``AB {...}``: "warm" -> {"steps": of a round}, "round N" -> {"us": of one step}; first of all it says what it made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ANSWER = "AB "


def force(settings: dict[str, str]) -> None:
    """Has every call of these operations take that backend, which raises where it cannot serve."""
    from pallas_kernels import registry

    real = registry.resolve

    def resolve(operation: str, *given: Any, forced: str | None = None, **more: Any) -> Any:
        return real(operation, *given, forced=forced or settings.get(operation), **more)

    registry.resolve = resolve  # type: ignore[assignment]


def steps_of(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What is timed, and facts about it."""
    import glm52_jax

    folder = Path(request["folder"]).resolve()
    if not Path(glm52_jax.__file__).resolve().is_relative_to(folder):
        raise SystemExit(f"ab: glm52_jax comes from {glm52_jax.__file__}, not from {folder}")
    from bench import step
    from bench.step_model import StepSpec, glm52, make_weights
    from glm52_jax.config import Config
    from glm52_jax.tiny import tiny_config

    force(request["backends"])
    sizes = request["tiny"]
    config = glm52(request["layers"]) if sizes is None else Config.from_hf(tiny_config(**sizes))
    prepared = step.prepare(
        StepSpec(config, **request["spec"]), make_weights(StepSpec(config, **request["spec"]).shapes())
    )
    found = step.backends(prepared.steps.program.choices)
    return prepared.steps, {"compile_s": round(prepared.compile_s, 1), "backends": found}


def answer(facts: dict[str, Any]) -> None:
    print(ANSWER + json.dumps(facts), flush=True)


def main() -> None:
    request = json.loads(sys.argv[1])
    steps, facts = steps_of(request)
    answer(facts)
    for line in sys.stdin:
        what, *count = line.split()
        if what == "warm":
            steps.warm_up()
            answer({"steps": steps.in_flight})
        else:
            answer({"us": steps.run(int(count[0])) / int(count[0]) * 1e6})


if __name__ == "__main__":
    main()
