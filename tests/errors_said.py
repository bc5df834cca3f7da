"""Every error that the package itself raises, as its source says it."""

import ast

ERRORS = ("BoundaryError", "EstimatorError", "StageError", "MisconfigurationException")
UNKNOWN = "…"


def text_of(node):
    """The sentence in an expression, with `…` for whatever is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return UNKNOWN


def errors_in(folder):
    """Sentences of all errors made in the Python files below `folder`."""
    nodes = (node for path in sorted(folder.rglob("*.py")) for node in ast.walk(ast.parse(path.read_text())))
    calls = (node for node in nodes if isinstance(node, ast.Call) and node.args)
    return [text_of(call.args[0]) for call in calls if getattr(call.func, "id", None) in ERRORS]
