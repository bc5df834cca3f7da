"""The errors of the engine: each names the argument, what was expected, what came and what to do."""


class DNIError(Exception):
    """Base of every error that this package raises on its own account."""


class BoundaryError(DNIError, ValueError):
    """A boundary cannot be cut as asked: unknown name, never run, or the gradient has a way around it."""


class EstimatorError(DNIError, ValueError):
    """A gradient estimator cannot be built or used: wrong shape, missing context, not finite."""


class StageError(DNIError, RuntimeError):
    """A stage cannot be differentiated where and when the engine has to do it."""


class StudyError(DNIError, ValueError):
    """A study's YAML, or the folder of an earlier one, is not what it should be."""
