"""Sends one report to one tracker by its client; a script that reads its request from stdin.

It imports nothing of ours. Of this machine nothing is sent: no code, git state, console, names of files or host.
"""

from __future__ import annotations

import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROJECT = "requant"  # where the tracker's own variable names no other


def to_wandb(request: dict[str, Any]) -> None:
    """To wandb, online or as WANDB_MODE says."""
    import wandb

    quiet = {"disable_git": True, "disable_code": True, "disable_job_creation": True, "console": "off", "silent": True}
    hidden = {"x_disable_stats": True, "x_disable_meta": True, "x_disable_machine_info": True}
    hidden["x_save_requirements"] = False
    known = wandb.Settings.model_fields if hasattr(wandb.Settings, "model_fields") else {}
    settings = wandb.Settings(**quiet, **{key: value for key, value in hidden.items() if key in known})
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT), name=request["name"], config=request["settings"],
        dir=request["folder"], save_code=False, settings=settings,
    )  # fmt: skip
    run.define_metric("stage")
    run.define_metric("stages/*", step_metric="stage")
    for step, numbers in request["stages"]:
        run.log({"stage": step, **numbers})
    for name, points in request["curves"].items():
        run.define_metric(f"{name}/step")
        run.define_metric(name, step_metric=f"{name}/step")
        for step, value in points:
            run.log({f"{name}/step": step, name: value})
    run.summary.update(request["numbers"])
    artifact = wandb.Artifact(wandb_name(f"{request['name']}-report"), type="report")
    for file in request["files"]:
        artifact.add_file(file, name=Path(file).name)
    run.log_artifact(artifact)
    run.finish()


def wandb_name(name: str) -> str:
    """An artifact's name as wandb takes it: at most 128 letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[-128:]


def to_mlflow(request: dict[str, Any]) -> None:
    """To the server of MLFLOW_TRACKING_URI, else a local database."""
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    own = (
        f"sqlite:///{request['folder']}/mlflow.db" if has("sqlalchemy") else Path(request["folder"], "mlruns").as_uri()
    )
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or own)
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    found = client.get_experiment_by_name(experiment)
    number = found.experiment_id if found else client.create_experiment(experiment)
    run = client.create_run(number, run_name=request["name"])  # not start_run, which adds user, file and git state
    now = run.info.start_time
    metrics = [Metric(name, value, now, 0) for name, value in request["numbers"].items()]
    metrics += [Metric(n, v, now, step) for step, numbers in request["stages"] for n, v in numbers.items()]
    metrics += [Metric(n, v, now, int(step)) for n, points in request["curves"].items() for step, v in points]
    metrics = [Metric(mlflow_name(m.key), m.value, m.timestamp, m.step) for m in metrics]
    params = [Param(mlflow_name(name), value[:500]) for name, value in request["settings"].items()]
    for begin in range(0, max(len(metrics), len(params)), 100):  # as many as one call takes
        client.log_batch(run.info.run_id, metrics[begin : begin + 100], params[begin : begin + 100])
    for file in request["files"]:
        client.log_artifact(run.info.run_id, file)
    client.set_terminated(run.info.run_id)


def mlflow_name(name: str) -> str:
    """A name as mlflow takes it: letters, digits and a few signs, of parts that are no `..` and not empty."""
    parts = (re.sub(r"[^\w. :-]", "_", part) for part in name.split("/"))
    return "/".join(part if part.strip(".") else f"_{part}" for part in parts)


def to_trackio(request: dict[str, Any]) -> None:
    """To trackio, a local database unless TRACKIO_SPACE_ID names a space."""
    os.environ.setdefault("TRACKIO_DIR", str(Path(request["folder"], "trackio")))
    import trackio

    trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=request["name"], config=request["settings"],
        auto_log_gpu=False,
    )  # fmt: skip
    for step, numbers in request["stages"]:
        trackio.log(numbers, step=step)
    for name, points in request["curves"].items():
        for step, value in points:
            trackio.log({name: value}, step=int(step))
    trackio.log(request["numbers"])
    trackio.finish()


def to_tensorboard(request: dict[str, Any]) -> None:
    """To event files."""
    from tensorboard.summary import Writer

    folder = Path(os.environ.get("TENSORBOARD_LOGDIR") or Path(request["folder"], "tensorboard"), request["name"])
    writer = Writer(str(folder))
    series = [[0, request["numbers"]], *request["stages"]]
    series += [[int(step), {name: value}] for name, points in request["curves"].items() for step, value in points]
    for step, numbers in series:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
    writer.close()


def has(name: str) -> bool:
    """Whether a package is installed."""
    return find_spec(name) is not None


def main() -> None:
    """Send the request of stdin; a failure is one line and exit code 1."""
    request = json.load(sys.stdin)
    clients = {"wandb": to_wandb, "mlflow": to_mlflow, "trackio": to_trackio, "tensorboard": to_tensorboard}
    try:
        clients[request["tracker"]](request)
    except Exception as error:  # noqa: BLE001  # a client may raise anything
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
