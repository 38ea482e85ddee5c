"""`python -m requant`, which launchers such as torchrun start by its name."""

from requant.cli.main import main

main()
