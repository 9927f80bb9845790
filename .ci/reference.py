"""What the site says below the cell that defines an exported name (settings.ini: `renderer`).

A heading to link to, the line of the module, the docstring, and a table of the parameters with
types and defaults as the source writes them. The definition itself stands above, in its cell.
"""
import ast
import inspect
import io
import re
import tokenize
from functools import cache
from pathlib import Path

from IPython.display import Markdown

from nbdev.config import get_config

PACKAGE = Path(__file__).resolve().parents[1]/"paligemma_nb"
Row = tuple[str, str, str, str] # name, type, default, what the comment says


@cache
def modules() -> list[tuple[Path, str, ast.Module]]: # with their source, and it parsed
    files = [(path, path.read_text(encoding="utf-8")) for path in PACKAGE.glob("[a-z]*.py")]
    return [(path, source, ast.parse(source)) for path, source in sorted(files)]


def find(name: str, said: str | None) -> tuple[str, str]: # its source in the package, a link
    "Two modules may have a name; the docstring tells which is meant."
    config = get_config()
    for path, source, tree in modules():
        for node in tree.body:
            if getattr(node, "name", "") != name or ast.get_docstring(node) != said: continue
            lines = source.splitlines()[node.lineno - 1:node.end_lineno]
            url = f"{config.git_url}/blob/{config.branch}/{path.parent.name}/{path.name}"
            return "\n".join(lines), f"{url}#L{node.lineno}"
    raise ValueError(f"{name} is not exported: run nbdev_export")


def described(source: str) -> tuple[str, list[Row]]: # docstring; parameters and result
    tree = ast.parse(source).body[0]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens
                if token.type == tokenize.COMMENT}

    def written(node): # an annotation in quotes without them
        text = node and ast.get_source_segment(source, node) or ""
        return re.sub(r"""^(["'])([A-Za-z_.]+[\[ |].*)\1$""", r"\2", text)

    def row(name, annotation, default, line):
        return name, written(annotation), written(default), comments.get(line, "")

    text, function = ast.get_docstring(tree) or "", tree
    if isinstance(tree, ast.ClassDef): # a dataclass has fields, another class __init__
        function = next((x for x in tree.body if getattr(x, "name", "") == "__init__"), None)
        fields = [x for x in tree.body if isinstance(x, ast.AnnAssign)]
        if function is None:
            return text, [row(x.target.id, x.annotation, x.value, x.end_lineno)
                          for x in fields]
    args, plain = function.args, function.args.posonlyargs + function.args.args
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults + args.kw_defaults
    found = [*zip(plain + args.kwonlyargs, defaults)]
    found += [(arg, None) for arg in (args.vararg, args.kwarg) if arg]
    rows = [row(x.arg, x.annotation, default, x.end_lineno) for x, default in found
            if x.arg != "self"]
    if (result := function.returns) is not None: # its comment stands behind the colon
        lines = range(result.end_lineno, function.body[0].lineno)
        line = next((n for n in lines if n in comments), 0)
        rows.append(row("**returns**", result, None, line))
    return text, rows


def as_written(sym, name: str | None = None, title_level: int = 3) -> Markdown:
    "Called by nbdev's show_doc."
    name = name or sym.__name__
    source, url = find(name, inspect.getdoc(sym))
    text, rows = described(source)
    link = f'[source]({url}){{style="float:right; font-size:smaller"}}'
    page = [link, f"{'#' * title_level} {name}", text]
    if rows:
        lines = ["| | type | default | |", "|---|---|---|---|"]
        for row in rows:
            name, kind, default, about = (" ".join(x.split()).replace("|", r"\|") for x in row)
            code = (f"`{x}`" if x else "" for x in (kind, default))
            lines.append(f"| {name} | {' | '.join(code)} | {about} |")
        page.append("\n".join(lines))
    return Markdown("\n\n".join(page))
