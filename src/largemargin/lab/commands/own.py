"""``lab.compare`` and ``largemargin compare --train``: losses compared in a training function of the user's own."""

import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..arguments.options import given_fields, path_of, plain
from ..arguments.parsers import compare_parser
from ..comparison.folder import check_folder, device_of, reopen, write_marker
from ..comparison.own import OwnComparison
from ..comparison.plan import AUTO
from ..errors import LabError, RunFailed
from ..queue.attempt import inside
from ..queue.budget import Budget, nothing_known
from ..queue.runs import default_jobs
from ..results import result_of
from ..run.environment import check_device
from ..run.planned import text_of
from ..trial.digest import digest_of
from ..trial.losses import Given, given_losses
from ..trial.work import WORK, Sent
from ..words import counted
from .checked import check_arguments
from .comparing import as_json as comparison_as_json
from .comparing import do_runs, say_if_other
from .progress import given_jobs
from .result import Result, result_of_runs
from .screen import Screen, print_json
from .seeds import seeds_of

MANY_BYTES = 200 * 10**6  # that travel to each process


OPTIONS_OF_IMAGES = (
    *("data", "data_root", "image_size", "network", "epochs", "label_noise", "train_fraction", "long_tail", "labels", "target"),
    "unverified",
)


def run(options: Any, console: Console) -> None:
    """``largemargin compare --train``."""
    usual = compare_parser().get_defaults()
    for name in OPTIONS_OF_IMAGES:
        if options[name] != usual[name]:
            raise LabError(f"--{name.replace('_', '-')} is for images, and the function of --train brings its own data; leave it out")
    for name in given_fields(options.recipe):
        raise LabError(f"--recipe.{name} is for images, and the function of --train has its own loop; leave it out")
    for name in ("no_save", "keep_weights", "tensorboard", "eager"):
        if options[name]:
            raise LabError(f"--{name.replace('_', '-')} is for images; leave it out with --train")
    out = path_of(options.out)
    found = compare(
        imported(options.train),
        plain(options.losses),
        lam=plain(options.lam),
        seeds=AUTO if AUTO in options.seeds else plain(options.seeds),
        max_seeds=options.max_seeds,
        out=out,
        validation_fraction=float(options.validation_fraction),
        device=options.device,
        jobs=given_jobs(options),
        executor=options.executor,
        minutes=None if options.minutes is None else float(options.minutes),
        timeout=None if options.timeout is None else float(options.timeout),
        reuse=bool(options.reuse),
        console=console,
    )
    console.print(found.text, markup=False, highlight=False, soft_wrap=True, end="")
    if options.json:
        print_json(comparison_as_json(reopen(out), found.rows, out) | {"failures": dict(found.failures)})
    if found.failures and not found.rows:
        raise RunFailed("no run could be done; run the same command to try again.")
    if found.failures:
        raise RunFailed(f"{counted(len(found.failures), 'run')} could not be done. The others are kept; run the same command to continue.")


def compare(
    train: Callable[..., Any],
    losses: Iterable[Any],
    *,
    lam: float | Iterable[float],
    seeds: Iterable[int] | str,
    max_seeds: int | None,
    out: Any,
    settings: Mapping[str, Any] | None = None,
    metric: str | None = None,
    lower_is_better: bool | None = None,
    validation_fraction: float,
    device: str | None,
    threads: int = 1,
    jobs: int | None,
    executor: str,
    minutes: float | None,
    timeout: float | None,
    reuse: bool,
    quiet: bool = False,
    console: Console | None = None,
) -> Result:
    """:func:`largemargin.lab.compare`, where the arguments are explained."""
    check_arguments(locals())
    check_place(train)
    given, folder = given_losses(losses), Path(out).expanduser()
    console = console or Screen(width=140, emoji=False, quiet=quiet, force_jupyter=False)
    if not isinstance(seeds, str | Iterable):
        raise LabError(f'seeds must be several whole numbers, or "auto", got {seeds!r}; give range({seeds}), say')
    wanted: list[Any] = [seeds] if isinstance(seeds, str) else list(seeds)
    if not wanted:
        raise LabError('seeds is empty; give at least one whole number, better range(5), or "auto"')
    comparison = OwnComparison(
        function=name_of(train),
        losses=tuple(one.name for one in given),
        words=OwnComparison.words_of(given),
        lam=numbers("lam", [lam] if isinstance(lam, int | float) else lam),
        **seeds_of(wanted, max_seeds),
        validation_fraction=validation_fraction,
        settings=as_json(settings or {}),
        judged_by=metric or "",
        lower_is_better=lower_is_better,
        device=device or device_of(folder),
        threads=threads,
    )
    if len(comparison.lam) > 1 and not comparison.choosing:
        raise LabError(f"lam {comparison.lam}: none of the losses {', '.join(comparison.losses)} has a lam to choose; give one, or none")
    if minutes is not None and executor != "local":
        raise LabError(f'minutes is for executor="local", got executor="{executor}"; leave one of them out')
    budget = None if minutes is None else Budget(float(minutes), measure=nothing_known)
    sent = packed(train, given, console)
    prepare(comparison, folder, sent[1], reuse, console)
    jobs = jobs or default_jobs(comparison.device, False, on_cpu=2)
    comparison, failed = do_runs(comparison, folder, jobs, console, executor, budget, work=WORK, sent=sent[0], timeout=timeout)
    return result_of_runs(comparison, folder, failed)


def check_place(train: Any) -> None:
    """Refuse what is no function of one argument, and a call that a run's own process makes."""
    if inside.is_set():
        raise LabError(
            "lab.compare was called in the process of a run, which imports the file of your function: put the call under "
            'if __name__ == "__main__":'
        )
    if not callable(train):
        raise LabError(f"train must be a function that takes the run and returns its scores, got {train!r}")
    try:
        inspect.signature(train).bind(None)
    except TypeError as error:
        raise LabError(f"train must take one argument, the run: {name_of(train)}{inspect.signature(train)} does not ({error})") from error
    except ValueError:  # of a function without a signature
        return


def name_of(train: Any) -> str:
    return str(getattr(train, "__name__", None) or type(train).__name__)


def numbers(name: str, values: Iterable[Any]) -> tuple[float, ...]:
    found = tuple(dict.fromkeys(values))
    wrong = next((one for one in found if isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one < math.inf), None)
    if wrong is not None or not found:
        raise LabError(f"{name} must be a finite number from 0 on, or several, got {repr(wrong) if found else 'none'}")
    return found


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a run gets them."""
    if not isinstance(settings, Mapping) or not all(isinstance(name, str) for name in settings):
        raise LabError(f'settings must be a dictionary with text for names, {{"epochs": 20}} say, got {settings!r:.60}')
    try:
        found = json.loads(json.dumps(dict(settings), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise LabError(f"settings must hold numbers, texts and lists of these, which name a run: {error}") from error
    return dict(found)


def packed(train: Callable[..., Any], given: Sequence[Given], console: Console) -> tuple[bytes, dict[str, str]]:
    """What travels to the processes of the runs, and the digests of the sources."""
    import cloudpickle

    factories = {one.name: one.factory for one in given if one.factory is not None}
    for what, thing in {"train": train, **{f'what makes the loss "{name}"': one for name, one in factories.items()}}.items():
        try:
            size = len(cloudpickle.dumps(thing))
        except Exception as error:
            raise LabError(
                f"{what} cannot travel to the process of a run ({type(error).__name__}: {error}); make what it holds inside of the "
                "function, or put it into a module that can be imported"
            ) from error
        if size > MANY_BYTES:
            console.print(f"{what} carries {size / 1e6:,.0f} MB to each process; load large data inside of the function", markup=False)
    digests = {one.name: digest_of(train, one.factory) for one in given}
    return cloudpickle.dumps(Sent(train, factories, digests)), digests


def prepare(comparison: OwnComparison, out: Path, digests: Mapping[str, str], reuse: bool, console: Console) -> None:
    """Look at what the folder holds, and say in it what is compared."""
    check_device(comparison.device)
    check_folder(out)
    try:
        say_if_other(comparison, out, console)
        if not reuse:
            refuse_other_source(comparison, out / "runs", digests)
        write_marker(comparison, out)
    except OSError as error:
        raise LabError(f"out {out} cannot be written to: {error.strerror or error}; choose another folder") from error


def refuse_other_source(comparison: OwnComparison, runs: Path, digests: Mapping[str, str]) -> None:
    """Raises LabError where finished runs were done by another version of the function or of a loss."""
    found = [(trial, result_of(trial, runs)) for trial in planned_trials(comparison)]
    other = [trial for trial, record in found if record is not None and record.digest != digests[trial.loss]]
    if other:
        were, them = ("was", "it") if len(other) == 1 else ("were", "them")
        raise LabError(
            f"the source of {comparison.function}, or of a loss, has changed since {counted(len(other), 'run')} of {runs} {were} done "
            f"({'; '.join(map(text_of, other[:3]))}{'; ...' if len(other) > 3 else ''}): give reuse=True (--reuse) to keep {them}, or "
            "another out to begin anew"
        )


def planned_trials(comparison: OwnComparison) -> list[Any]:
    """All runs that may be done, whichever lam is chosen."""
    noise = comparison.label_noise[0]
    tried = [(loss, lam) for loss in comparison.losses for lam in (comparison.lam if comparison.has_lam(loss) else comparison.lam[:1])]
    final = [comparison.planned(loss, seed, noise, lam=lam) for seed in comparison.seeds for loss, lam in tried]
    return [*comparison.validating_recipes(), *final]


def imported(name: str) -> Callable[..., Any]:
    """The function of ``--train package.module:function``."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise LabError(f"--train {name}: give the module and the function, package.module:train say")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise LabError(f"--train {name}: the module cannot be imported ({error}); give the command in the folder that holds it") from error
    if not hasattr(found, function):
        raise LabError(f"--train {name}: {module} has no {function}")
    return getattr(found, function)  # type: ignore[no-any-return]
