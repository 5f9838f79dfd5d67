"""The command ``imu-ray``; the scripts in ``jobs/`` are doors to it."""

import argparse
import json
import logging
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import imu_ray
from imu_ray.errors import CheckpointError, ConfigError, ImuError, is_refusal
from imu_ray.events import event, log_events
from imu_ray.requests.arguments import add_actions

if TYPE_CHECKING:  # what a command needs is imported when it runs, so that `imu-ray --help` is quick
    from imu_ray.job import JobConfig

ENDING = """\
The last line of standard output is a JSON object with status, reason, run_dir, report (path or null) and metrics.
Exit status, by status:
  0    reached, already_met, epochs_done (there was no target), complete (a command without a target)
  1    failed: the run, trials of a sweep, or requests; `verify`: something is not as the record says
  2    refused: the configuration or the input is wrong
  3    not_reached, stopped_by_guard: the model has not forgotten what it was asked to
  130  interrupted: Ctrl-C          the same command goes on with the run; `sweep` with --resume
  143  terminated: SIGTERM          likewise"""
EXIT = {"failed": 1, "refused": 2, "not_reached": 3, "stopped_by_guard": 3, "interrupted": 130, "terminated": 143}


def _unlearn(job: "JobConfig", options: argparse.Namespace) -> dict[str, Any]:
    return _after_ascent(job, imu_ray.unlearn(**job.arguments(), run_dir=job.run_dir))


def _score(job: "JobConfig", options: argparse.Namespace) -> dict[str, Any]:
    arguments = job.arguments()
    del arguments["evaluation"]
    table = imu_ray.score(**arguments, run_dir=job.run_dir)
    kept = sum(weight > 0 for weight in table["intensity"].to_pylist())
    return {"metrics": {"samples": len(table), "kept": kept}}


def _ascend(job: "JobConfig", options: argparse.Namespace) -> dict[str, Any]:
    from imu_ray.run.directory import RunDirectory

    path, mark, query = options.intensities.partition("?")
    name = path.rpartition("/")[2]
    try:
        intensities = RunDirectory((path.removesuffix(name) or ".") + mark + query).read_table(name)
    except (OSError, ValueError) as error:  # pyarrow's own
        raise CheckpointError(f"{path} cannot be read: {error}; expected the table that a score left") from None
    return _after_ascent(job, imu_ray.ascend(**job.arguments(), intensities=intensities, run_dir=job.run_dir))


def _after_ascent(job: "JobConfig", result: "imu_ray.UnlearnResult") -> dict[str, Any]:
    ascent = result.manifest["ascent"]
    return {"status": ascent["status"], "reason": ascent["reason"], "report": _report(job), "metrics": result.metrics}


def _audit(job: "JobConfig", options: argparse.Namespace) -> dict[str, Any]:
    original = job.original.spec() if job.original else None
    metrics = imu_ray.audit(**job.arguments(), original=original, run_dir=job.run_dir)
    return {"report": _report(job), "metrics": metrics}


def _report(job: "JobConfig") -> str | None:
    from imu_ray.run.storage import below

    return below(job.run_dir, "report.html") if job.audit.report else None


def _plan(job: "JobConfig", options: argparse.Namespace) -> dict[str, Any]:
    """The plan, with its figures in words on standard error."""
    made = imu_ray.plan(**job.arguments(), memory=options.memory)
    for name, part in made["sets"].items():
        features = f"{part['feature_bytes'] / 1e6:,.1f} MB of features"
        print(f"{name}: {part['samples']:,} samples, {part['shards']:,} shards, {features}", file=sys.stderr)
    for key, value in made["peak_bytes"].items():
        print(f"{key.replace('_', ' ')}: {value / 1e6:,.1f} MB at most", file=sys.stderr)
    told = list(made["memory"]["why"]) if "memory" in made else []
    if made["seconds"]:
        seconds = f"{made['seconds']['without_ascent']:,.1f} s on {made['workers']} workers"
        told.append(f"{seconds}, the ascent not included (estimate)")
    print(*told, *made["notes"], sep="\n", file=sys.stderr)
    return {"run_dir": None, "plan": made}


def _remember(job: "JobConfig", options: argparse.Namespace) -> dict[str, Any]:
    arguments = job.arguments()
    given = arguments.pop("forget_set")
    del arguments["evaluation"]
    if options.factors is None:
        train_set = options.train_set or given
        path = imu_ray.remember(**arguments, train_set=train_set, path=options.out, rows=options.rows)
    else:
        if options.train_set is not None or options.rows is not None:
            raise ConfigError(
                "--factors was given with --train-set or --rows; expected either: factors are sums over rows already"
            )
        path = imu_ray.import_factors(**arguments, factors=options.factors, path=options.out)
    return {"run_dir": None, "bundle": str(path)}


def _sweep(job: "JobConfig", options: argparse.Namespace) -> dict[str, Any]:
    from imu_ray.experiments.axes import read_axes
    from imu_ray.run.storage import below

    own = {"axes": read_axes(job.axes), "settings": job.sweep, "sweep_dir": job.run_dir, "resume": options.resume}
    result = imu_ray.sweep(**job.arguments(), **own)
    statuses = result.table["status"].to_pylist()
    failed = statuses.count("failed")
    return {
        "status": "failed" if failed else "complete",
        "reason": f"{len(statuses)} trials, {failed} failed",
        "report": below(job.run_dir, "sweep.html"),
        "metrics": {"trials": len(statuses), "best": result.best, "failed": failed},
    }


def _ensemble(job: "JobConfig", options: argparse.Namespace) -> dict[str, Any]:
    """The ensemble, with its table on standard error."""
    from imu_ray.run.directory import RunDirectory

    if job.ensemble.train_fn is None:
        raise ConfigError("ensemble.train_fn is null; expected package.module:callable, which trains a model")
    given = {key: value for key, value in job.arguments().items() if key != "task"}
    given |= {"train_fn": job.ensemble.train_fn, "settings": job.ensemble, "run_dir": job.run_dir}
    result = imu_ray.ensemble(**given)
    with RunDirectory(job.run_dir).storage.fetch("table.md") as path:
        print(path.read_text() if path else "", file=sys.stderr)
    made = 2 * job.ensemble.models
    return {
        "status": "failed" if result.failed else "complete",
        "reason": f"{made} models, {len(result.failed)} failed",
        "metrics": {"methods": result.table, "failed": result.failed},
    }


def _demo(options: argparse.Namespace) -> dict[str, Any]:
    from imu_ray.demo import run_demo
    from imu_ray.distributed.session import ray_of_its_own
    from imu_ray.run.directory import default_run_dir

    out = Path(options.out or default_run_dir()).absolute()
    with ray_of_its_own(cpus=2):
        made = run_demo(out)
    return {"run_dir": str(out), "metrics": {name: run["metrics"] for name, run in made.items()}, **made}


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from imu_ray.handover.export import export_run

    return {"run_dir": options.run, "export": str(export_run(options.run, options.out, options.sign_key))}


def _verify(options: argparse.Namespace) -> dict[str, Any]:
    """What was found, a line for each part on standard error."""
    from imu_ray.handover.verify import verify_run

    keys = {"checkpoint": options.checkpoint, "public_key": options.public_key, "key": options.key}
    found = verify_run(options.run, **keys, ids=options.id)
    for each in found:
        print(f"{each.part}: {each.status}: {each.told}", file=sys.stderr)
    changed = sorted({each.part for each in found if each.status == "changed"})
    told = f"changed: {', '.join(changed)}" if changed else "everything that was looked at is as the record says"
    return {
        "status": "failed" if changed else "complete",
        "reason": told,
        "run_dir": options.run,
        "findings": [vars(each) for each in found],
    }


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    """The table on standard error, or with ``--json`` all of it in the last line."""
    found = imu_ray.compare(*options.runs)
    if options.out is not None:
        found.write_page(options.out)
    if not options.json:
        print(found.text(), file=sys.stderr)
    fair = f"warnings: {len(found.warnings)}" if found.warnings else "the runs can be compared"
    return {"reason": fair, "report": options.out, **({"comparison": found.to_json()} if options.json else {})}


STAGES = {
    "unlearn": (_unlearn, "make a model forget: score, ascend, audit"),
    "score": (_score, "write every sample's influence and intensity, and change nothing"),
    "ascend": (_ascend, "make a model forget with given intensities"),
    "audit": (_audit, "measure a model, beside the `original` one if the job file names it"),
    "plan": (_plan, "say what `unlearn` will take, and run nothing"),
    "remember": (_remember, "keep the curvature of a training set for later requests, without a sample"),
    "sweep": (_sweep, "try settings and forget-set sizes"),
    "ensemble": (_ensemble, "train many models, unlearn each, and audit the populations"),
}


def _request(options: argparse.Namespace) -> dict[str, Any]:
    from imu_ray.requests.command import request_command

    if options.action == "run":
        _warn_of_credentials()
    return request_command(options)


OTHERS = {"demo": _demo, "compare": _compare, "export": _export, "verify": _verify, "request": _request}


def main(*command: str) -> int:
    """Run a command line: ``command``, then the arguments of this process. Returns the exit status (``ENDING``)."""
    options = _parser().parse_args([*command, *sys.argv[1:]])
    if options.command == "schema":
        from imu_ray.job import job_schema
        from imu_ray.run.metrics import metrics_schema

        print(json.dumps({"job": job_schema, "metrics": metrics_schema}[options.of](), indent=2))
        return 0
    log_events("text")
    if os.getcwd() not in sys.path:  # a model may be defined where the job starts
        sys.path.append(os.getcwd())
    ending: dict[str, Any] = {"status": "complete", "reason": None, "run_dir": None, "report": None, "metrics": None}
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        of_its_own = OTHERS.get(options.command)
        ending |= of_its_own(options) if of_its_own else _run_stage(options, ending)
    except ImuError as error:
        status = "refused" if is_refusal(error) else "failed"
        ending |= {"status": status, "reason": f"{type(error).__name__}: {error}"}
    except KeyboardInterrupt:
        ending |= {"status": "interrupted", "reason": "by SIGINT"}
    except SystemExit:  # Ray may put its own in the place of ours
        ending |= {"status": "terminated", "reason": "by SIGTERM"}
    except Exception as error:
        traceback.print_exc()
        ending |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    finally:
        signal.signal(signal.SIGTERM, before)
    code = EXIT.get(ending["status"], 0)
    level = {0: logging.INFO, 3: logging.WARNING}.get(code, logging.ERROR)
    event("job ended", level=level, **{key: ending[key] for key in ("status", "reason", "run_dir", "report")})
    print(json.dumps(ending), flush=True)
    return code


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(EXIT["terminated"])


def _run_stage(options: argparse.Namespace, ending: dict[str, Any]) -> dict[str, Any]:
    from imu_ray.job import JobConfig

    job = JobConfig.load(options.config, options.set)
    log_events(job.log)
    _warn_of_credentials()
    ending["run_dir"] = job.run_dir  # where to go on from, if the stage does not end
    stage, _ = STAGES[options.command]
    return stage(job, options)


def _warn_of_credentials() -> None:
    """Say that the runtime environment of the submitted job shows what looks like a credential."""
    from imu_ray.distributed.session import submitted_job

    variables = ((submitted_job() or {}).get("runtime_env") or {}).get("env_vars") or {}
    shown = [name for name in variables if re.search("SECRET|TOKEN|PASSWORD|CREDENTIAL|ACCESS_KEY", name.upper())]
    if shown:
        advice = "the dashboard shows it to everyone; take it out and give the nodes a role, or mount a secret"
        names = ", ".join(sorted(shown))
        event("credentials in the runtime environment", level=logging.WARNING, variables=names, advice=advice)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("imu-ray", description=imu_ray.__doc__, epilog=ENDING, formatter_class=raw)
    parser.add_argument("--version", action="version", version=imu_ray.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in STAGES.items():
        stage = commands.add_parser(name, help=text, description=text, epilog=ENDING, formatter_class=raw)
        stage.add_argument("--config", required=True, help="job file (YAML): model, forget_set, evaluation, settings")
        stage.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
        if name == "ascend":
            stage.add_argument("--intensities", required=True, metavar="PATH", help="intensities.parquet, or its URI")
        if name == "remember":
            stage.add_argument(
                "--out", required=True, metavar="PATH", help="the bundle, a .safetensors file, or its URI"
            )
            stage.add_argument(
                "--train-set", metavar="PATH", help="the training set; default the job's forget_set.path"
            )
            stage.add_argument("--rows", type=int, metavar="N", help="so many rows, drawn at random; default all")
            stage.add_argument(
                "--factors",
                metavar="FOLDER",
                help="in place of a training set: the factors that kronfluence fitted on it",
            )
        if name == "plan":
            stage.add_argument(
                "--memory",
                type=float,
                nargs="+",
                default=(40.0, 80.0),
                metavar="GB",
                help="sizes of a device that layers of a language model are held against; default 40 80",
            )
        if name == "sweep":
            stage.add_argument("--resume", action="store_true", help="go on with what run_dir holds")
    schema = commands.add_parser("schema", help="print the JSON schema of a job file, for editors, or of metrics.json")
    schema.add_argument("of", nargs="?", default="job", choices=("job", "metrics"), help="default job")
    demo = commands.add_parser("demo", help="forget a handwritten digit, and 5 %% random digits, on two local workers")
    demo.add_argument("--out", help="directory of data, models and runs; default runs/<time>-<id>")
    text = "put runs side by side: settings that differ, status words, all figures, seconds; a table on standard error"
    compare = commands.add_parser("compare", help=text, description=text, epilog=ENDING, formatter_class=raw)
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run directory, its URI, or an exported folder or .zip")
    compare.add_argument("--json", action="store_true", help="no table, but all of it in the last line")
    compare.add_argument("--out", metavar="PATH", help="write a page (.html) too, or below a URI")
    text = "write what may be handed on of a run: record, figures and report, without an id"
    export = commands.add_parser("export", help=text, description=text)
    export.add_argument("run", metavar="RUN", help="run directory, or its URI")
    export.add_argument("--out", required=True, metavar="PATH", help="a new folder, or a .zip file")
    export.add_argument("--sign-key", metavar="PEM", help="Ed25519 private key to sign the record with")
    text = "say whether a run, or what was exported of it, is still what was written; exit status 1 where it is not"
    verify = commands.add_parser("verify", help=text, description=text)
    verify.add_argument("run", metavar="RUN", help="run directory, its URI, or an exported folder or .zip")
    verify.add_argument("--checkpoint", metavar="PATH", help="the checkpoint to hold against the record")
    verify.add_argument("--public-key", metavar="PEM", help="key that the signature must be of")
    verify.add_argument("--key", metavar="FILE", help="secret of the ids' fingerprints (record.key)")
    verify.add_argument("--id", action="append", default=[], metavar="ID", help="an id to look for, with --key")
    text = "a queue of deletion requests, carried out one batch after the other from the current model"
    request = commands.add_parser("request", help=text, description=text, epilog=ENDING, formatter_class=raw)
    add_actions(request)
    return parser
