"""The command ``makeready``: launch, plan, doctor, bench. Bad input ends with exit code 2 and a sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from .config import KV_CACHE_DTYPES, LAYOUTS, MAMBA_CACHE_MODES, PAGE_STRATEGIES, EngineConfig
from .device import parse_bytes
from .errors import ConfigError, MakereadyError
from .usage import named, refuse_values_of_switches

if TYPE_CHECKING:
    from .platforms.plan import Plan

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _size(_: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Bytes of an option that takes ``80GiB``, ``512MB`` or plain bytes."""
    return None if value is None else parse_bytes(value, option=option.opts[0])


def _layers(_: click.Context, option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Layer indices of an option that takes ``0,5``."""
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(",") if part.strip())
    except ValueError:
        raise ConfigError(
            f"{option.opts[0]} {value!r} is no list of layers; write their indices, such as 0,5",
            option=option.opts[0],
            value=value,
            expected="layer indices, such as 0,5",
        ) from None


def _options(*decorators: Decorator) -> Decorator:
    def apply(command: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


def _settings(*names: str) -> Decorator:
    """Options for settings, with the type, the default and the words of their records."""
    records = (type(getattr(EngineConfig(), part.name)) for part in fields(EngineConfig))
    known = {setting.name: setting for record in records for setting in fields(record)}

    def option(name: str) -> Decorator:
        kind, doc = str(known[name].type), known[name].metadata["doc"]
        value = bool if kind == "bool" else float if kind == "float" else int
        usual = known[name].default
        said = f"{doc[0].upper()}{doc[1:]}." + (f"  [default: {usual}]" if usual else "")
        flag = f"--{name.replace('_', '-')}"
        return click.option(flag, name, type=value, is_flag=value is bool, default=None, help=said)

    return _options(*map(option, names))


_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")

_DECISIONS = _options(
    click.option("--backend", help="Attention backend for every layer: flex, flash, reference or a plugin's."),
    click.option(
        "--provider",
        "flash_provider",
        help="flash: whose kernels, such as fa3 or triton (doctor lists them). Used or refused, never replaced.",
    ),
    click.option(
        "--mixer-backend",
        default="auto",
        show_default=True,
        help="Kernels of state layers: auto, triton, fla, mamba-ssm, causal-conv1d, reference or a plugin's.",
    ),
    click.option("--block-size", type=int, help="KV block size in tokens. Checked and kept, never replaced."),
    click.option(
        "--kv-cache-dtype",
        default="auto",
        show_default=True,
        help=f"Dtype of K and V in the cache: {', '.join(KV_CACHE_DTYPES)}.",
    ),
    click.option(
        "--kv-cache-dtype-skip-layers",
        callback=_layers,
        metavar="N,N",
        help="Layers whose K and V stay in the model's dtype, such as 0,5.",
    ),
    click.option(
        "--page-strategy",
        default="auto",
        show_default=True,
        help=f"How states and attention share the pool: {', '.join(PAGE_STRATEGIES)} or auto.",
    ),
    click.option("--layout", default="auto", show_default=True, help=f"Physical order of pages: {', '.join(LAYOUTS)}."),
    click.option(
        "--mamba-cache-mode",
        default="none",
        show_default=True,
        help=f"Where states are kept: {', '.join(MAMBA_CACHE_MODES)}.",
    ),
    click.option("--mamba-block-size", type=int, help="Tokens between kept states (align, all). Respected or refused."),
    click.option("--mamba-cache-dtype", default="auto", show_default=True, help="Dtype of convolution states."),
    click.option("--mamba-ssm-cache-dtype", default="auto", show_default=True, help="Dtype of recurrent states."),
    click.option(
        "--mamba-prefill-checkpoint-alignment",
        type=int,
        help="Tokens at whose multiples prefill can keep a state (align, all): blocks become a multiple of it.",
    ),
    click.option("--dtype", default="auto", show_default=True, help="Dtype of weights and activations."),
    click.option("--max-model-len", type=int, help="Longest sequence, prompt and output together, in tokens."),
    click.option("--memory", "memory_bytes", callback=_size, help="Memory for the cache, such as 80GiB."),
    _settings(
        "memory_fraction",
        "batch_invariant",
        "flex_attn_block_m",
        "flex_attn_block_n",
        "flex_attn_q_block_size",
        "flex_attn_kv_block_size",
    ),
    click.option("--device-memory", "device_memory_bytes", callback=_size, help="Total memory of the device."),
    _settings("num_blocks", "max_num_seqs", "max_num_batched_tokens"),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="makeready", message="makeready %(version)s")
def cli() -> None:
    """Everything between `import engine` and the first token that depends on the hardware.

    \b
    makeready launch                      run the small hybrid model that comes with the package
    makeready plan MODEL --platform xpu   decide without the device
    makeready doctor                      what is installed, probed, chosen or refused, and why
    makeready bench                       measure: kernels beside installed peers, start-up, waste
    """


@cli.command()
@click.argument("model", required=False)
@click.option("--list", "list_presets", is_flag=True, help="Print the names of the presets and stop.")
@click.option("--platform", help="Platform to plan for: cpu, cuda, xpu or a plugin's. It need not be here.")
@click.option("--tensor-parallel-size", "--tp", type=int, default=1, show_default=True, help="Ranks per layer.")
@click.option("--pipeline-parallel-size", "--pp", type=int, default=1, show_default=True, help="Stages of layers.")
@click.option("--data-parallel-size", "--dp", type=int, default=1, show_default=True, help="Replicas of the model.")
@click.option("--num-speculative-tokens", type=int, default=0, show_default=True, help="Draft tokens per step.")
@click.option(
    "--engine",
    default="vllm",
    show_default=True,
    help="Whose states are stored: vllm (convolutions keep K-1 columns) or transformers (K columns, float32 states).",
)
@click.option(
    "--free-out-of-window",
    is_flag=True,
    default=None,
    help="Count for an engine that returns blocks which have left a sliding window.",
)
@_settings("extra_retained_tokens")
@click.option("--mla-page-alignment", type=int, help="Bytes that pages of latents (MLA) are a multiple of.")
@click.option(
    "--use-replayssm",
    is_flag=True,
    default=None,
    help="Count the rings of recent inputs that vLLM's ReplaySSM keeps beside every mamba2 state.",
)
@click.option("--replayssm-buffer-len", type=int, help="Tokens of history in a ReplaySSM ring; 16 by default.")
@click.option("--mamba-backend", help="Whose kernels read ReplaySSM rings: triton (default) or flashinfer.")
@click.option("--explain", is_flag=True, help="Add the reason of every decision.")
@click.option(
    "--compare",
    "axes",
    multiple=True,
    metavar="OPTION=V,V",
    help="Plan every combination side by side: platform=cuda,xpu, tp=1,2,4, page-strategy=unified,subdivided ...",
)
@click.option("--plot", "picture", metavar="FILE", help="Draw where the memory goes into a png, svg or pdf.")
@_DECISIONS
@_JSON
def plan(
    model: str | None,
    list_presets: bool,
    as_json: bool,
    explain: bool,
    axes: tuple[str, ...],
    picture: str | None,
    **options: Any,
) -> None:
    """Decide backends, block size, pages and capacity for MODEL, without the device.

    MODEL is a preset name (--list prints them), a checkpoint directory or a config.json.

    \b
    makeready plan nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 --platform xpu --memory 40GiB
    makeready plan ./checkpoint --platform cuda --tp 4 --kv-cache-dtype fp8 --json
    makeready plan Qwen/Qwen3.5-27B --platform cuda --memory 40GiB --compare tp=1,2,4 --compare kv-cache-dtype=auto,fp8
    """
    from .startup import plan as decide

    if list_presets:
        _list_presets(as_json)
        return
    if model is None:
        raise click.UsageError("Missing MODEL: a preset name (--list prints them), a directory or a config.json.")
    if axes:
        _compare(model, _given(options), axes, picture, as_json)
        return
    made = decide(model, **_given(options))
    drawn = _draw(made, picture)
    decided = made.to_dict()
    if as_json:
        _print_json(decided)
        return
    from .report import make_console, plan_summary, reasons

    console = make_console()
    console.print(plan_summary(decided), *drawn)
    if explain:
        console.print("", reasons(decided))


@cli.command()
@click.argument("model", required=False)
@click.option("--prompt", "-p", "prompts", multiple=True, help="Text to continue; may be given several times.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True, help="Tokens to generate per prompt.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Draw from the k most likely; 0 takes all.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Draw from the smallest set this likely.")
@click.option("--seed", type=int, help="The same seed draws the same tokens, whatever else runs.")
@click.option("--platform", help="Platform to run on; the default is the best whose probe succeeds.")
@_settings("device_index")
@click.option(
    "--packed-steps/--no-packed-steps",
    default=None,
    help="One forward per step, with mixer kernels; or the model's own.",
)
@click.option("--compile-layers/--no-compile-layers", default=None, help="Compile decoder layers of packed steps.")
@click.option("--cuda-graphs/--no-cuda-graphs", default=None, help="Replay steps of decodes as CUDA graphs.")
@click.option(
    "--async-scheduling/--no-async-scheduling", default=None, help="Prepare the next step while the device works."
)
@click.option("--explain/--no-explain", default=True, show_default=True, help="Print the reason of every decision.")
@_DECISIONS
@_JSON
def launch(
    model: str | None,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    explain: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Run MODEL, a checkpoint directory, and continue each prompt.

    Without MODEL, the small hybrid Mamba/attention model that comes with makeready runs.

    \b
    makeready launch
    makeready launch ./checkpoint --prompt "Once upon a time" --prompt "The end" --max-new-tokens 32
    makeready launch --num-blocks 12 --max-num-seqs 4 --backend reference --json
    """
    from .engines.transformers.records import SamplingParams
    from .running import Launch, run

    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    texts = prompts or ("A function definition",)
    result = run(Launch(model=model, prompts=texts, params=params, explain=explain, quiet=as_json), _given(options))
    if as_json:
        _print_json(result)


@cli.command()
@_JSON
def doctor(as_json: bool) -> None:
    """Show every platform, backend and plugin: seen, probed, chosen or refused, and why."""
    from .plugins.doctor import examine
    from .plugins.manager import load_plugins

    report = examine(load_plugins()).to_dict()
    if as_json:
        _print_json(report)
        return
    from .report import doctor_summary, make_console

    make_console().print(doctor_summary(report))


class _Benchmarks(click.Group):
    """Each module of makeready.benchmarks is a command; its own options are behind ``NAME --help``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        from .benchmarks.catalogue import benchmarks

        return list(benchmarks())

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        from .benchmarks.catalogue import benchmarks

        found = benchmarks().get(name)
        if found is None:
            return None

        def measure(arguments: tuple[str, ...]) -> None:
            try:
                main = found.load()
            except ModuleNotFoundError as error:
                raise ConfigError(
                    f"makeready bench {name} needs {error.name}, which is not installed "
                    "(pip install 'makeready[engine,triton]')",
                    option="bench",
                    value=name,
                    expected=error.name,
                ) from error
            sys.exit(main(arguments))

        return click.Command(
            name,
            callback=measure,
            help=found.summary,
            params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
            context_settings={"ignore_unknown_options": True, "help_option_names": []},
        )


@cli.group(cls=_Benchmarks)
def bench() -> None:
    """Measure on this machine, each figure with its correctness beside it and the peers in the same run.

    Every benchmark has --json, --out FILE and a --help that says what it measures and against what.

    \b
    makeready bench attention --backend flash --peer fa3=/path/to/peers
    makeready bench cold-start --runs 15 --json
    makeready bench waste --markdown
    """


def _compare(model: str, options: dict[str, Any], axes: tuple[str, ...], picture: str | None, as_json: bool) -> None:
    """Plans side by side; refused ones keep their sentence, and only all of them refused is an error."""
    from .comparing import compare, comparison_table, parse_axes

    if picture is not None:
        raise click.UsageError("--plot draws one plan; leave out --compare.")
    variants = compare(model, options, parse_axes(axes))
    if as_json:
        _print_json({"model": model, "variants": [variant.to_dict() for variant in variants]})
    else:
        from .report import make_console

        make_console().print(comparison_table(variants))
    errors = [variant.error for variant in variants if variant.error is not None]
    if len(errors) == len(variants):
        raise errors[0]


def _draw(made: Plan, picture: str | None) -> tuple[str, ...]:
    """The line that says where the drawing is, if one was asked for."""
    if picture is None:
        return ()
    from .plotting import plot_plan

    return (f"\ndrawn into {plot_plan(made, picture)}",)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given: ``None`` leaves the default of the settings records in force."""
    return {name: value for name, value in options.items() if value is not None}


def _list_presets(as_json: bool) -> None:
    from .hybrid.presets import preset_names

    names = list(preset_names())
    if as_json:
        _print_json({"presets": names})
    else:
        click.echo("\n".join(names))


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script; exits with 0, or 2 on bad input."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given and given[0] in ("plan", "launch", "doctor"):
            refuse_values_of_switches(cli.commands[given[0]], given)
        sys.exit(cli.main(args=given, prog_name="makeready", standalone_mode=False) or 0)
    except click.ClickException as error:
        if "--json" in given:
            _print_json(named(error).to_dict())
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("Aborted!", err=True)
        sys.exit(1)
    except MakereadyError as error:
        if "--json" in given:
            _print_json(error.to_dict())
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
