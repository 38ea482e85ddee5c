"""requant: a QLoRA fine-tune in, a deployable GPTQ checkpoint and a quality-loss report out."""

__version__ = "0.1.0"
