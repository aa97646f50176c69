"""What does each command do? Loads, calls the library, and prints."""

import argparse
import dataclasses
import json
import os
import pathlib
import runpy
import sys
import traceback
from typing import Any

from keras_kd._progress import Verbose
from keras_kd.cli import _files


def demo(options: argparse.Namespace) -> None:
    """Teacher, students, files: compared; or a search for smaller teachers."""
    from keras_kd import demo as demonstration

    small = options.dataset == "digits"
    usual = (15 if small else 5) if options.search else (60 if small else 20)
    settings = demonstration.Settings(
        dataset=options.dataset,
        epochs=options.epochs or usual,
        teacher_epochs=25 if small else 6,
        seeds=options.seeds,
        seed=options.seed,
    )
    if options.search:
        demonstration.search(settings, options.out, trials=options.trials, verbose=not options.quiet)
    else:
        demonstration.run(settings, options.out, verbose=not options.quiet)


def inspect(options: argparse.Namespace) -> None:
    """A profile, and with data a linear analysis."""
    from keras_kd import analysis, profile

    model = _files.load_model(options.model, unsafe=options.unsafe)
    x, y = (None, None) if options.data is None else _files.load_data(options.data, model)
    verbose: Verbose = 0 if options.json else "auto"
    found = profile.profile(model, data=x, verbose=verbose)
    report = None if x is None else analysis.linear_analysis(model, x, y, verbose=verbose)
    if options.json:
        _print_json({"profile": found.as_dict()} | ({} if report is None else {"linear_analysis": report.as_dict()}))
        return
    print(found)
    if report is not None:
        print(f"\n{report}")


def compare(options: argparse.Namespace) -> None:
    """A table, JSON or a page of several files."""
    from keras_kd import report

    subjects: dict[str, Any] = {}
    for word in options.models:
        name, found, path = word.partition("=")
        name, path = (name, path) if found else (pathlib.Path(word).stem, word)
        if name in subjects:  # student.keras beside student.tflite
            name = pathlib.Path(path).name
        if name in subjects:
            raise ValueError(f'Every model needs a name of its own: name=path gives one. Received twice: "{name}".')
        is_file = pathlib.Path(path).suffix == ".tflite"
        subjects[name] = path if is_file else _files.load_model(path, unsafe=options.unsafe)
    models = [one for one in subjects.values() if not isinstance(one, str)]
    x, y = _files.load_data(options.data, models[0] if models else None)
    found = report.compare(subjects, x, y, verbose=0 if options.json else "auto")
    if options.html:
        found.to_html(options.html)
    print(found.to_json() if options.json else found)


def prune(options: argparse.Namespace) -> None:
    """A smaller model in a file."""
    from keras_kd import surgery

    model = _files.load_model(options.model, unsafe=options.unsafe)
    target = _files.target(options.out, ".keras")
    x, y = _files.load_data(options.data, model)
    smaller, report = surgery.prune_channels(
        model,
        macs=options.macs,
        parameters=options.parameters,
        latency=options.latency,
        data=x,
        labels=y if options.criterion in ("taylor", "fisher") else None,
        criterion=options.criterion,
        round_to=options.round_to,
        verbose=0 if options.json else "auto",
        return_report=True,
    )
    _files.save(smaller, target)
    if options.json:
        kept = {name: indices.tolist() for name, indices in report.kept.items()}
        numbers = ("macs", "macs_after", "parameters", "parameters_after", "note")
        _print_json({"path": str(target), "kept": kept} | {name: getattr(report, name) for name in numbers})
        return
    print(report)
    print(f"written: {target}")


def export(options: argparse.Namespace) -> None:
    """A LiteRT file."""
    from keras_kd import export as exporting

    model = _files.load_model(options.model, unsafe=options.unsafe)
    target = _files.target(options.out, ".tflite")
    x = None if options.data is None else _files.load_data(options.data, model)[0]
    card = _files.new_target(options.card, ".md") if options.card else None
    if options.test is not None and card is None:
        raise ValueError("--test measures what the card says. Add --card README.md, or leave out --test.")
    tested = None if options.test is None else _files.load_data(options.test, model)
    verbose: Verbose = 0 if options.json else "auto"
    report = exporting.to_litert(model, target, quantization=options.quantization, representative_data=x, verbose=verbose)
    if card is not None:
        _write_card(card, model, report, tested)
    if options.json:
        _print_json({**dataclasses.asdict(report), "path": str(report.path)})
        return
    print(report)
    print(f"written: {target}")


def _write_card(path: pathlib.Path, model: Any, exported: Any, tested: Any) -> None:
    """The card of a file, with what it and its model give on data, if there are any."""
    from keras_kd import report

    found = None if tested is None else report.compare({"model": model, "file": exported.path}, *tested, verbose=0)
    report.model_card(exported, path, comparison=found, name=None if found is None else "file")


def compress(options: argparse.Namespace) -> None:
    """The best file within a budget."""
    from keras_kd.compression import compress as compressed

    model = _files.load_model(options.model, unsafe=options.unsafe)
    x, y = _files.load_data(options.data, model)
    loss, why = (None, "") if y is None else _files.load_loss(options.model, unsafe=options.unsafe)
    if why and options.max_trials:
        print(f"keras-kd compress: labels are for the scores alone: {why}", file=sys.stderr)
    found = compressed(
        model,
        x,
        y,
        budget=options.budget,
        validation_data=None if options.validation is None else _files.load_data(options.validation, model),
        max_trials=options.max_trials,
        max_minutes=options.max_minutes,
        epochs=options.epochs,
        loss=loss,
        folder=options.out,
        verbose=0 if options.json else "auto",
    )
    print(found.to_json() if options.json else found)


def search(options: argparse.Namespace) -> None:
    """A user's script, with KerasTuner's environment variables around it."""
    script = pathlib.Path(options.script)
    if not script.is_file():
        raise FileNotFoundError(f'There is no file "{script}".')
    is_single = not options.chief and options.worker is None
    own = {word.split("=")[0] for word in options.arguments} & {"--chief", "--worker", "--address"}
    if own and is_single:
        raise ValueError(
            f"Options of keras-kd must stand before the script. Received: {', '.join(sorted(own))} behind {script}. If they are "
            f"the script's own: python {script} does the same without --chief and --worker."
        )
    if is_single != (options.address is None):
        raise ValueError(
            "--address HOST:PORT, the chief's, must be given with --chief and with --worker NAME, and with these alone. Received: "
            + ("--address without either." if options.address is not None else "no --address.")
        )
    if options.address is not None:
        _join(options)
    sys.argv = [str(script), *options.arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception as error:  # the user's own: where it happened matters
        traceback.print_exc()
        raise SystemExit(1) from error


def _join(options: argparse.Namespace) -> None:
    """Sets the environment of a chief or a worker, and looks whether the chief is where it shall be."""
    from keras_kd.tuner import check_chief, distributed

    host, port = distributed.split(options.address)
    if options.worker is not None and (not options.worker or "chief" in options.worker):
        raise ValueError(f'--worker must be a name without "chief", which KerasTuner keeps for that. Received: "{options.worker}".')
    name = str(options.worker or "chief")
    os.environ |= {"KERASTUNER_TUNER_ID": name, "KERASTUNER_ORACLE_IP": host, "KERASTUNER_ORACLE_PORT": str(port)}
    print(f"keras-kd search: {name} at {host}:{port}", flush=True)
    check_chief(timeout=options.timeout)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=1))
