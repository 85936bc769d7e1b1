"""``makeready launch`` for people: the decisions, progress while loading and generating, text as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from .config import EngineConfig
from .engines.asked import require_followed
from .engines.checkpoint import require_checkpoint
from .engines.installed import require_transformers
from .report import make_console, plan_summary, reasons
from .startup import BUNDLED_MODEL, prepare

if TYPE_CHECKING:
    from .engines.transformers.engine import TransformersEngine
    from .engines.transformers.records import Completion, Output, SamplingParams
    from .engines.transformers.records import Progress as Generated


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What the command was asked to do."""

    model: str | None
    prompts: tuple[str, ...]
    params: SamplingParams
    explain: bool
    quiet: bool
    """True prints nothing: the caller prints the result."""
    started: float = field(default_factory=time.perf_counter)


def run(launch: Launch, options: Mapping[str, Any]) -> dict[str, Any]:
    """Prepare, load, generate, and show each as it happens.

    :return: the plan, the completions and the times in seconds, as JSON-ready values.
    :raises MakereadyError: as :func:`makeready.prepare` and the engine do.
    """
    console = make_console(quiet=launch.quiet)
    launch.params.validated()
    model = require_checkpoint(launch.model or BUNDLED_MODEL)
    require_transformers()
    config = EngineConfig.from_options(model=model, **options)
    require_followed(config)
    ready = prepare(config)
    require_followed(config, ready.device.device_type)
    facts = ready.to_dict()
    prepared = time.perf_counter()
    console.print(plan_summary(facts))
    if launch.explain:
        console.print("", reasons(facts))
    from .engines.transformers.launching import open_engine, silence

    silence()

    with _loading(console) as on_progress:
        engine = open_engine(ready, on_progress)
    loaded = time.perf_counter()
    if launch.explain:
        console.print("how steps run:", *(f"  - {reason}" for reason in engine.execution.reasons), sep="\n")
    if any(attention.name == "flex" for attention in ready.attention.values()):
        console.print("flex compiles its kernels before the first tokens; later runs find them in torch's cache")
    try:
        completions = _generate(engine, launch, console)
    finally:
        engine.close()
    ended = time.perf_counter()
    tokens = sum(len(completion.token_ids) for completion in completions)
    console.print(
        f"\n{tokens} tokens in {ended - loaded:.1f} s ({tokens / (ended - loaded):.1f} tokens/s), after "
        f"{loaded - launch.started:.1f} s of start-up",
    )
    return {
        "plan": facts,
        "execution": list(engine.execution.reasons),
        "completions": [_completion(prompt, done) for prompt, done in zip(launch.prompts, completions, strict=True)],
        "seconds": {
            "prepare": round(prepared - launch.started, 3),
            "load": round(loaded - prepared, 3),
            "generate": round(ended - loaded, 3),
        },
    }


def _generate(engine: TransformersEngine, launch: Launch, console: Console) -> list[Completion]:
    """One prompt is printed as its text comes; several run together under one bar."""
    if len(launch.prompts) == 1 and not launch.quiet:
        return [_streamed(engine, launch, console)]
    most = len(launch.prompts) * launch.params.max_new_tokens
    with _bar(console, MofNCompleteColumn()) as bar:
        task = bar.add_task("tokens", total=most)
        finished = 0

        def report(progress: Generated) -> None:
            nonlocal finished
            bar.update(task, completed=progress.tokens)
            if progress.finished > finished and not console.is_terminal:
                console.print(f"generating: {progress.finished} of {progress.total} prompts, {progress.tokens} tokens")
            finished = progress.finished

        completions = engine.generate(launch.prompts, launch.params, report)
    if launch.quiet:
        return completions
    for prompt, completion in zip(launch.prompts, completions, strict=True):
        console.print()
        console.print(prompt, style="bold", end="", soft_wrap=True)
        console.file.write(f"{completion.text}\n")
    return completions


def _streamed(engine: TransformersEngine, launch: Launch, console: Console) -> Completion:
    started = False

    def show(output: Output) -> None:
        nonlocal started
        if not started:
            console.print()
            console.print(launch.prompts[0], style="bold", end="", soft_wrap=True)
            started = True
        console.file.write(output.text)  # as it is: rich would turn tabs into spaces
        console.file.flush()

    completion = engine.generate(launch.prompts, launch.params, on_output=show)[0]
    console.print()
    return completion


@contextmanager
def _loading(console: Console) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, a line per stage elsewhere."""
    if not console.is_terminal:
        seen: set[str] = set()

        def report(what: str, share: float) -> None:
            if what not in seen:
                seen.add(what)
                console.print(f"loading: {what}")

        yield report
        return
    with _bar(console, TaskProgressColumn()) as bar:
        task = bar.add_task("loading", total=1.0)
        yield lambda what, share: bar.update(task, description=f"loading {what}", completed=share)


def _bar(console: Console, count: TaskProgressColumn | MofNCompleteColumn) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        count,
        console=console,
        transient=True,
        disable=console.quiet or not console.is_terminal,
    )


def _completion(prompt: str, completion: Completion) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "num_prompt_tokens": len(completion.prompt_token_ids),
        "finish_reason": completion.finish_reason,
        "num_preemptions": completion.num_preemptions,
    }
