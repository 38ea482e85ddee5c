"""Tracking: what the report holds, sent to experiment trackers by their own clients.

    trackers         which are installed; send(report, ...) in a process of its own   <- start here
    payload          numbers, curves and settings of a report
    clients          the script of that process: wandb, mlflow, trackio, tensorboard

May import: errors, outgoing.
"""
