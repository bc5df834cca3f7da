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


def sentences_of(tree):
    """What the errors made in a module say, also where a function of it puts the sentence together."""
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ERRORS and node.args:
            said = node.args[0]
            if isinstance(said, ast.Call):
                maker = functions.get(getattr(said.func, "id", None))
                if maker is None:  # str(error): that of another error
                    continue
                parts = [n for n in ast.walk(maker) if isinstance(n, ast.JoinedStr)]
                yield max(map(text_of, parts), key=len)
            else:
                yield text_of(said)


def errors_in(folder):
    """Sentences of all errors made in the Python files below `folder`; not those handed on from elsewhere."""
    trees = [ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))]
    return [sentence for tree in trees for sentence in sentences_of(tree) if sentence != UNKNOWN]
