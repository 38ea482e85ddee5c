"""The one exception of requant_eval: a measurement that can't be made."""


class EvaluationError(Exception):
    """The measurement can't be made or would be wrong.

    The message says what was found and what to do.
    """
