"""The one exception of the judge: the measurement can't be made, and what to do about it."""


class EvaluationError(Exception):
    """The measurement can't be made or would be wrong. The message says what was found and what to do."""
