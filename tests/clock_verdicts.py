"""Finds verdicts by the clock: asserts whose outcome depends on a measured time.

A small interpreter follows measured times from the clock through names, functions and
containers. Printing them is fine, asserting on them is not, and a count beside a time stays a
count. In place of a value it computes what is measured of it: False (nothing), True (all),
`Items` (of a container's elements), `Function` or `Module`. It does not follow attributes of a
file's own classes, `global` names, nor containers that are changed under a second name.
"""
import ast
import re
from collections import ChainMap
from dataclasses import dataclass, field
from functools import cache
from itertools import repeat
from pathlib import Path

CLOCKS = {"timeit": {"timeit", "repeat", "default_timer"}, "os": {"times"},
          "time": {name + end for end in ("", "_ns") for name in
                   ("time", "perf_counter", "process_time", "thread_time", "monotonic")}}
METHODS = {"timeit", "blocked_autorange", "elapsed_time", "cpu_times"}  # of whatever object
FIELDS = {"ru_utime", "ru_stime"}
CHOICES = {"kernels", "can_pack", "int4_pays"}  # a probe chooses a way; each way must be right
PACKAGE = Path(__file__).resolve().parents[1]/"paligemma_nb"
DEEPEST = 6     # calls within calls; further down a result is as measured as its arguments
SHORTEST = 600  # seconds: a busy machine may reach a time limit below


# --- what is measured of a value

class Items(dict): "By key; None stands for elements whose key is not known"
class Mapping(Items): "Iterating over it gives the keys"


@dataclass(frozen=True, eq=False)
class Function:
    node: ast.AST | None = None  # a def or a lambda; None: a clock
    scope: ChainMap | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Module:
    name: str


def is_measured(value):
    return value is True or isinstance(value, Items) and any(map(is_measured, value.values()))


def join(*values):
    "Of something that may be any of the values"
    if any(value is True for value in values): return True
    containers = [v for v in values if isinstance(v, Items)]
    if not containers: return next((v for v in values if v is not False), False)
    keys = dict.fromkeys(key for v in containers for key in v)
    kind = type(containers[0])
    return kind({key: join(*(v.get(key, False) for v in containers)) for key in keys})


def element(value, key):
    if not isinstance(value, Items): return value is True
    if isinstance(key, int) and key < 0 and None not in value: key += len(value)
    return join(value.get(key, False), value.get(None, False))


def elements(value):
    return join(*value.values()) if isinstance(value, Items) else value is True
def iterated(value): return False if isinstance(value, Mapping) else elements(value)
def some(value): return Items({None: value})
def pairs(value): return some(Items(enumerate((False, value))))


class Interpreter:
    def __init__(self): self.found, self.depth, self.known = {}, 0, {}

    # --- expressions

    def value(self, node, scope):
        method = getattr(self, "value_" + type(node).__name__, self.value_of_children)
        return method(node, scope)

    def value_of_children(self, node, scope):
        children = [self.value(child, scope) for child in ast.iter_child_nodes(node)]
        return any(map(is_measured, children))

    def value_Name(self, node, scope): return scope.get(node.id, False)
    def value_Lambda(self, node, scope): return Function(node, scope)
    def value_Starred(self, node, scope): return self.value(node.value, scope)

    def value_NamedExpr(self, node, scope):
        self.bind(node.target, self.value(node.value, scope), scope)
        return self.value(node.target, scope)

    def value_Attribute(self, node, scope):
        base = self.value(node.value, scope)
        if node.attr in FIELDS: return True
        clocks = CLOCKS.get(base.name, METHODS) if isinstance(base, Module) else METHODS
        return Function() if node.attr in clocks else element(base, node.attr)

    def value_Subscript(self, node, scope):
        base, key = self.value(node.value, scope), self.value(node.slice, scope)
        if key is True or isinstance(node.slice, ast.Slice): return key is True or base
        try: return element(base, ast.literal_eval(node.slice))
        except (ValueError, TypeError): return elements(base)

    def value_List(self, node, scope):
        values = [self.value(item, scope) for item in node.elts]
        starred = [isinstance(item, ast.Starred) for item in node.elts]
        if not any(starred): return Items(enumerate(values))
        return some(join(*(iterated(v) if star else v for v, star in zip(values, starred))))
    value_Tuple = value_List

    def value_Dict(self, node, scope):
        names = [getattr(key, "value", None) for key in node.keys]
        values = [self.value(item, scope) for item in node.values]
        return join(*(Mapping({name: value}) if key else value  # without a key: **value
                      for key, name, value in zip(node.keys, names, values)))

    def value_Compare(self, node, scope):
        sides = [self.value(side, scope) for side in (node.left, *node.comparators)]
        for i, operator in enumerate(node.ops):
            if isinstance(operator, (ast.Is, ast.IsNot)): sides[i:i + 2] = False, False
            if isinstance(operator, (ast.In, ast.NotIn)): sides[i + 1] = iterated(sides[i + 1])
        return any(map(is_measured, sides))

    def value_IfExp(self, node, scope):
        if is_measured(self.value(node.test, scope)): return True
        return join(self.value(node.body, scope), self.value(node.orelse, scope))

    def value_ListComp(self, node, scope):
        inner, chosen = scope.new_child(), False
        for loop in node.generators:
            self.bind(loop.target, iterated(self.value(loop.iter, inner)), inner)
            chosen |= any([is_measured(self.value(test, inner)) for test in loop.ifs])
        if isinstance(node, ast.DictComp):
            chosen |= is_measured(self.value(node.key, inner))
            return chosen or Mapping({None: self.value(node.value, inner)})
        return chosen or some(self.value(node.elt, inner))
    value_SetComp = value_GeneratorExp = value_DictComp = value_ListComp

    def value_Yield(self, node, scope):
        value = node.value is not None and self.value(node.value, scope)
        self.result(some(value) if isinstance(node, ast.Yield) else value, scope)
        return False
    value_YieldFrom = value_Yield

    # --- calls

    def value_Call(self, node, scope):
        args = [self.value(arg, scope) for arg in node.args]
        kwargs = {k.arg: self.value(k.value, scope) for k in node.keywords}
        self.check_call(node, [*args, *kwargs.values()])
        if getattr(node.func, "id", "") in CHOICES: return False
        function = self.value(node.func, scope)
        if isinstance(function, Function): return self.call(function, args, kwargs, node)
        is_method = isinstance(node.func, ast.Attribute)
        call = self.call_method if is_method else self.call_builtin
        return call(node, args, kwargs, scope)

    def call_method(self, node, args, kwargs, scope):
        base = self.value(node.func.value, scope)
        match node.func.attr, args:
            case "append" | "add" | "insert" | "setdefault", [*_, new]:
                self.put(node.func.value, some(new), scope)
                return elements(base) if node.func.attr == "setdefault" else False
            case "extend", [new]: self.put(node.func.value, some(iterated(new)), scope)
            case "update", [new]: self.put(node.func.value, new, scope)
            case "keys", []: return False
            case "values", []: return some(elements(base))
            case "items", []: return pairs(elements(base))
            case "copy", []: return base
            case "get" | "pop", [_, *default] if isinstance(node.args[0], ast.Constant):
                return join(element(base, node.args[0].value), *default)
            case _: return is_measured(base) or self.mix(args, kwargs)
        return False

    def call_builtin(self, node, args, kwargs, scope):
        match getattr(node.func, "id", ""), args:
            case "len" | "isinstance" | "type" | "print" | "id" | "display", _: return False
            case "dict", _: return join(*args, Mapping(kwargs))
            case "list" | "tuple" | "sorted" | "reversed" | "set" | "iter", [whole]:
                return False if isinstance(whole, Mapping) else whole
            case "min" | "max", [whole, *others]:
                keys = [k.value for k in node.keywords if k.arg == "key"]
                if any(is_measured(self.value(key.value, scope)) for key in keys
                       if isinstance(key, ast.Attribute)): return True  # the clock chooses
                return join(whole, *others) if others else iterated(whole)
            case "next", [whole, *default]: return join(iterated(whole), *default)
            case "enumerate", [whole, *_]: return pairs(iterated(whole))
            case "zip", [rows] if isinstance(node.args[0], ast.Starred):  # gives columns
                row = iterated(rows)
                columns = row.items() if isinstance(row, Items) else [(None, row)]
                return Items({key: some(part) for key, part in columns})
            case "zip", _: return some(Items(enumerate(map(iterated, args))))
            case "map", [Function() as function, *rows]:
                return some(self.call(function, list(map(iterated, rows)), {}, node))
        return self.mix(args, kwargs)

    def mix(self, args, kwargs):
        "The result of a function that is not known; it may call the functions that it gets"
        values = [self.call(v, [], {}, v.node) if is_defined(v) else v
                  for v in (*args, *kwargs.values())]
        return any(map(is_measured, values))

    def call(self, function, args, kwargs, site):
        if function.node is None: return True  # a clock
        key = function, repr((args, kwargs))
        if key in self.known: return self.known[key]
        if self.depth == DEEPEST: return any(map(is_measured, (*args, *kwargs.values())))
        self.known[key] = False  # for a function that calls itself
        node, scope = function.node, function.scope.new_child()
        names, spread = [p.arg for p in (*node.args.posonlyargs, *node.args.args)], args
        passed = site.args if isinstance(site, ast.Call) else []
        if any(isinstance(arg, ast.Starred) for arg in passed):
            spread = repeat(join(*map(elements, args)))
        scope |= dict.fromkeys([*names, *(p.arg for p in node.args.kwonlyargs)], False)
        scope |= dict(zip(names, spread))
        scope |= {k: v for k, v in kwargs.items() if k in scope.maps[0]}
        if rest := node.args.vararg: scope[rest.arg] = some(join(*args[len(names):]))
        if rest := node.args.kwarg: scope[rest.arg] = Mapping({None: join(*kwargs.values())})
        self.depth += 1
        if isinstance(node, ast.Lambda): self.result(self.value(node.body, scope), scope)
        else: self.run(node.body, scope)
        self.depth -= 1
        self.known[key] = scope.maps[0].get("return", False)
        return self.known[key]

    def result(self, value, scope):
        scope["return"] = join(scope.maps[0].get("return", False), value)

    # --- statements

    def run(self, body, scope):
        for node in body: self.statement(node, scope)

    def statement(self, node, scope):
        match node:
            case ast.Assign() | ast.AnnAssign(value=ast.expr()):
                value = self.value(node.value, scope)
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets: self.bind(target, value, scope)
            case ast.AugAssign(): self.put(node.target, self.value(node.value, scope), scope)
            case ast.If(): self.branch(node, scope)
            case ast.While():
                for _ in range(2): self.branch(node, scope)  # a round may use the one before
            case ast.For():
                value = iterated(self.value(node.iter, scope))
                for _ in range(2):
                    self.bind(node.target, value, scope)
                    self.branches(scope, node.body, [])
                self.run(node.orelse, scope)
            case ast.With():
                for item in node.items:
                    value = self.value(item.context_expr, scope)
                    if item.optional_vars: self.bind(item.optional_vars, value, scope)
                self.run(node.body, scope)
            case ast.Try():
                handlers = ([*node.body, *handler.body] for handler in node.handlers)
                self.branches(scope, [*node.body, *node.orelse], *handlers)
                self.run(node.finalbody, scope)
            case ast.FunctionDef(): scope[node.name] = Function(node, scope)
            case ast.ClassDef(): self.run(node.body, scope.new_child())
            case ast.Return(value=ast.expr() as value):
                self.result(self.value(value, scope), scope)
            case ast.Import():
                scope |= {a.asname or a.name: Module(a.name) for a in node.names}
            case ast.ImportFrom():
                names = package_module(node.module or "")
                names = names | dict.fromkeys(CLOCKS.get(node.module, ()), Function())
                scope |= {a.asname or a.name: names.get(a.name, False) for a in node.names}
            case ast.Assert():
                if is_measured(self.value(node.test, scope)): self.report(node)
            case _: self.value_of_children(node, scope)

    def put(self, target, value, scope):
        "Into the container, or the sum, that `a`, `a.b` or `a[b]` stands for"
        while isinstance(target, (ast.Subscript, ast.Attribute)):
            key = getattr(target, "attr", None) or getattr(target.slice, "value", None)
            known = isinstance(key, (str, int))
            target, value = target.value, Mapping({key if known else None: value})
        if not isinstance(target, ast.Name) or not is_measured(value): return
        owner = next((names for names in scope.maps if target.id in names), scope)
        owner[target.id] = join(owner.get(target.id, False), value)

    def bind(self, target, value, scope):
        if isinstance(target, ast.Name): scope[target.id] = value
        elif isinstance(target, ast.Starred): self.bind(target.value, some(value), scope)
        elif isinstance(target, (ast.Subscript, ast.Attribute)): self.put(target, value, scope)
        else:
            known = not any(isinstance(t, ast.Starred) for t in target.elts)
            for i, t in enumerate(target.elts):
                self.bind(t, element(value, i) if known else iterated(value), scope)

    def branches(self, scope, *bodies):
        before, after = scope.maps[0], []
        for body in bodies:
            scope.maps[0] = dict(before)
            self.run(body, scope)
            after.append(scope.maps[0])
        names = dict.fromkeys(name for branch in after for name in branch)
        scope.maps[0] = {name: join(*(b.get(name, False) for b in after)) for name in names}

    def branch(self, node, scope):
        if is_measured(self.value(node.test, scope)) and any(map(can_fail, ast.walk(node))):
            self.report(node.test)
        self.branches(scope, node.body, node.orelse)

    # --- verdicts

    def report(self, node): self.found[node.lineno] = ast.unparse(node)

    def check_call(self, node, values):
        name = ast.unparse(node.func).split(".")[-1]
        checks = name.startswith(("assert_", "test_"))
        limits = [getattr(keyword.value, "value", None) for keyword in node.keywords
                  if keyword.arg in ("timeout", "deadline")]
        short = any(isinstance(n, (int, float)) and n < SHORTEST for n in limits)
        if checks and any(map(is_measured, values)) or short: self.report(node)


def is_defined(value): return isinstance(value, Function) and value.node is not None


def can_fail(node):
    if isinstance(node, (ast.Raise, ast.Assert)): return True
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.fail", "sys.exit")


@cache
def package_module(name):
    "The names of a module of the package; nothing is measured where nothing asks a clock"
    path, names = PACKAGE/f"{name.split('.')[-1]}.py", ChainMap()
    text = path.read_text() if name.startswith("paligemma_nb.") and path.exists() else ""
    if re.search(r"import .*\btime\b", text): Interpreter().run(ast.parse(text).body, names)
    return dict(names)


def clock_verdicts(source: str) -> list[str]:
    "A program's asserts that depend on a measured time, and its calls with a short time limit"
    tree, interpreter, scope = ast.parse(source), Interpreter(), ChainMap()
    interpreter.run(tree.body, scope)
    for node in ast.walk(tree):  # tests, and what else this file does not call
        if isinstance(node, ast.FunctionDef):
            fixtures = {p.arg: scope.get(p.arg) for p in node.args.args}  # of the same name
            values = {name: interpreter.call(f, [], {}, f.node)
                      for name, f in fixtures.items() if is_defined(f)}
            interpreter.call(Function(node, scope), [], values, node)
    return [text for _, text in sorted(interpreter.found.items())]
