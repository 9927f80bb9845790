"""Finds verdicts by the clock: asserts whose outcome depends on a measured time.

A small interpreter follows measured times from the clock through names, functions and
containers. Printing them is fine, asserting on them is not, and a count beside a time stays a
count. In place of a value it computes what is measured of it: False (nothing), True (all),
`Parts` (some parts of a container), `Function` (what can be called) or `Module`. It does not
follow attributes of a file's own classes, nor containers that are changed under a second name.
"""
import ast
import itertools
from dataclasses import dataclass
from pathlib import Path

CLOCKS = {
    "time": {"time", "perf_counter", "process_time", "thread_time", "monotonic"},
    "timeit": {"timeit", "repeat", "default_timer"},
    "os": {"times"},
}
CLOCKS["time"] |= {name + "_ns" for name in CLOCKS["time"]}
METHODS = {"timeit", "blocked_autorange", "elapsed_time", "cpu_times"}  # of whatever object
FIELDS = {"ru_utime", "ru_stime"}
CHOICES = {"kernels", "can_pack", "int4_pays"}  # a probe chooses a way; each way must be right
PACKAGE = Path(__file__).resolve().parents[1]/"paligemma_nb"
DEEPEST = 6     # calls within calls; further down a result is as measured as its arguments
SHORTEST = 600  # seconds: a busy machine may reach a time limit below


# --- what is measured of a value

@dataclass(frozen=True)
class Parts:
    parts: tuple = ()         # of (key, value); None: of elements whose key is not known
    is_mapping: bool = False  # iterating over it gives the keys

    @classmethod
    def of(cls, parts: dict, is_mapping=False): return cls(tuple(parts.items()), is_mapping)


@dataclass(frozen=True)
class Function:
    node: ast.AST | None = None  # a def or a lambda; None: a clock
    scope: object = None


@dataclass(frozen=True)
class Module:
    name: str


def is_measured(value):
    if isinstance(value, Parts): return any(is_measured(part) for _, part in value.parts)
    return value is True


def join(*values):
    "Of something that may be any of the values"
    values = [v for v in values if v is not False]
    if not values: return False
    if True in values: return True
    containers = [v for v in values if isinstance(v, Parts)]
    if not containers: return values[0]
    keys = dict.fromkeys(key for v in containers for key, _ in v.parts)
    parts = {key: join(*(dict(v.parts).get(key, False) for v in containers)) for key in keys}
    return Parts.of(parts, containers[0].is_mapping)


def elements(value):
    "Of any element"
    if not isinstance(value, Parts): return value is True
    return join(*(part for _, part in value.parts))


def element(value, key):
    if not isinstance(value, Parts): return value is True
    parts = dict(value.parts)
    if isinstance(key, int) and key < 0 and None not in parts: key += len(parts)
    return join(parts.get(key, False), parts.get(None, False))


def is_defined(value): return isinstance(value, Function) and value.node is not None
def is_keys(value): return isinstance(value, Parts) and value.is_mapping
def iterated(value): return False if is_keys(value) else elements(value)
def some(value, is_mapping=False): return Parts.of({None: value}, is_mapping)
def items(value): return some(Parts.of({0: False, 1: value}))


class Scope:
    def __init__(self, parent=None):
        self.names, self.parent, self.outer, self.results = {}, parent, set(), []

    def owner(self, name):
        scope = self.parent if name in self.outer and self.parent else self
        while scope and name not in scope.names: scope = scope.parent
        return scope

    def get(self, name): return owner.names[name] if (owner := self.owner(name)) else False

    def set(self, name, value):
        scope = self.owner(name) if name in self.outer else self
        (scope or self).names[name] = value

    def add(self, name, value):  # to what the name stands for already
        names = (self.owner(name) or self).names
        names[name] = join(names.get(name, False), value)


class Interpreter:
    def __init__(self): self.found, self.depth, self.known = {}, 0, {}

    # --- expressions

    def value(self, node, scope):
        method = getattr(self, "value_" + type(node).__name__, None)
        if method: return method(node, scope)
        children = [self.value(child, scope) for child in ast.iter_child_nodes(node)]
        return any(map(is_measured, children))

    def value_Name(self, node, scope): return scope.get(node.id)
    def value_Lambda(self, node, scope): return Function(node, scope)
    def value_Starred(self, node, scope): return self.value(node.value, scope)

    def value_NamedExpr(self, node, scope):
        value = self.value(node.value, scope)
        self.bind(node.target, value, scope)
        return value

    def value_Attribute(self, node, scope):
        base = self.value(node.value, scope)
        if node.attr in FIELDS: return True
        clocks = CLOCKS.get(base.name, METHODS) if isinstance(base, Module) else METHODS
        if node.attr in clocks: return Function()
        return element(base, node.attr)

    def value_Subscript(self, node, scope):
        base = self.value(node.value, scope)
        if self.value(node.slice, scope) is True: return True
        if isinstance(node.slice, ast.Slice): return base
        try: return element(base, ast.literal_eval(node.slice))
        except (ValueError, TypeError): return elements(base)

    def value_List(self, node, scope):
        values = [self.value(item, scope) for item in node.elts]
        starred = [isinstance(item, ast.Starred) for item in node.elts]
        if not any(starred): return Parts.of(dict(enumerate(values)))
        return some(join(*(iterated(v) if star else v for v, star in zip(values, starred))))
    value_Tuple = value_List

    def value_Dict(self, node, scope):
        whole = False
        for key, item in zip(node.keys, node.values):
            value = self.value(item, scope)
            if key is not None:
                name = key.value if isinstance(key, ast.Constant) else None
                value = Parts.of({name: value}, is_mapping=True)
            whole = join(whole, value)  # without a key: **value
        return whole

    def value_Compare(self, node, scope):
        sides = [self.value(side, scope) for side in (node.left, *node.comparators)]
        for i, operator in enumerate(node.ops):
            if isinstance(operator, (ast.Is, ast.IsNot)): sides[i:i + 2] = False, False
            if isinstance(operator, (ast.In, ast.NotIn)): sides[i + 1] = iterated(sides[i + 1])
        return any(map(is_measured, sides))

    def value_IfExp(self, node, scope):
        if is_measured(self.value(node.test, scope)): return True
        return join(self.value(node.body, scope), self.value(node.orelse, scope))

    def comprehension(self, node, scope, *parts):
        "Whether the clock chooses the elements, then the parts of one"
        inner, chosen = Scope(scope), False
        for loop in node.generators:
            self.bind(loop.target, iterated(self.value(loop.iter, inner)), inner)
            chosen |= any([is_measured(self.value(test, inner)) for test in loop.ifs])
        return chosen, *(self.value(part, inner) for part in parts)

    def value_ListComp(self, node, scope):
        chosen, value = self.comprehension(node, scope, node.elt)
        return chosen or some(value)
    value_SetComp = value_GeneratorExp = value_ListComp

    def value_DictComp(self, node, scope):
        chosen, key, value = self.comprehension(node, scope, node.key, node.value)
        return chosen or is_measured(key) or some(value, is_mapping=True)

    def value_Yield(self, node, scope):
        scope.results.append(some(node.value is not None and self.value(node.value, scope)))
        return False

    def value_YieldFrom(self, node, scope):
        scope.results.append(self.value(node.value, scope))
        return False

    # --- calls

    def value_Call(self, node, scope):
        args = [self.value(arg, scope) for arg in node.args]
        kwargs = {k.arg: self.value(k.value, scope) for k in node.keywords}
        self.check_call(node, [*args, *kwargs.values()])
        if isinstance(node.func, ast.Name) and node.func.id in CHOICES: return False
        function = self.value(node.func, scope)
        if isinstance(function, Function): return self.call(function, args, kwargs, node)
        if isinstance(node.func, ast.Attribute):
            base = self.value(node.func.value, scope)
            return self.call_method(node, base, args, kwargs, scope)
        return self.call_builtin(node, getattr(node.func, "id", ""), args, kwargs, scope)

    def call_method(self, node, base, args, kwargs, scope):
        name = node.func.attr
        if name in ("append", "add", "insert", "setdefault", "extend", "update"):
            if not args: return False
            new = some(args[-1])
            if name == "extend": new = some(iterated(args[0]))
            if name == "update": new = args[0]
            self.put(node.func.value, new, scope)
            return name == "setdefault" and elements(base)
        if name == "keys": return False
        if name == "values": return some(elements(base))
        if name == "items": return items(elements(base))
        if name == "copy": return base
        if name in ("get", "pop") and node.args and isinstance(node.args[0], ast.Constant):
            return join(element(base, node.args[0].value), *args[1:])
        return is_measured(base) or self.mix(args, kwargs)

    def call_builtin(self, node, name, args, kwargs, scope):
        if name in ("len", "isinstance", "type", "print", "id", "display"): return False
        if name == "dict": return join(*args, Parts.of(kwargs, is_mapping=True))
        if name in ("list", "tuple", "sorted", "reversed", "set", "iter") and len(args) == 1:
            return False if is_keys(args[0]) else args[0]
        if name in ("min", "max") and args:
            for keyword in node.keywords:  # key=times.get: the clock chooses
                chooser = keyword.value if keyword.arg == "key" else None
                if isinstance(chooser, ast.Attribute):
                    if is_measured(self.value(chooser.value, scope)): return True
            return iterated(args[0]) if len(args) == 1 else join(*args)
        if name == "next" and args: return join(iterated(args[0]), *args[1:])
        if name == "enumerate" and args: return items(iterated(args[0]))
        if name == "zip" and args:
            if not isinstance(node.args[0], ast.Starred):
                return some(Parts.of(dict(enumerate(map(iterated, args)))))
            row = iterated(args[0])  # zip(*rows) gives columns
            if not isinstance(row, Parts): return some(row)
            return Parts.of({key: some(part) for key, part in row.parts})
        if name == "map" and args and isinstance(args[0], Function):
            return some(self.call(args[0], list(map(iterated, args[1:])), {}, node))
        return self.mix(args, kwargs)

    def mix(self, args, kwargs):
        "The result of a function that is not known; it may call the functions that it gets"
        def result(v): return self.call(v, [], {}, v.node) if is_defined(v) else v
        return any([is_measured(result(v)) for v in (*args, *kwargs.values())])

    def call(self, function, args, kwargs, site):
        if function.node is None: return True  # a clock
        key = function, tuple(args), tuple(kwargs.items())
        if key in self.known: return self.known[key]
        if self.depth == DEEPEST: return any(map(is_measured, (*args, *kwargs.values())))
        self.known[key] = False  # for a function that calls itself
        node, scope = function.node, Scope(function.scope)
        names = [p.arg for p in (*node.args.posonlyargs, *node.args.args)]
        scope.names |= dict.fromkeys([*names, *(p.arg for p in node.args.kwonlyargs)], False)
        passed = site.args if isinstance(site, ast.Call) else []
        is_spread = any(isinstance(arg, ast.Starred) for arg in passed)
        given = itertools.repeat(join(*map(elements, args))) if is_spread else args
        scope.names |= dict(zip(names, given))
        if rest := node.args.vararg: scope.names[rest.arg] = some(join(*args[len(names):]))
        if rest := node.args.kwarg: scope.names[rest.arg] = some(join(*kwargs.values()), True)
        scope.names |= {k: v for k, v in kwargs.items() if k in scope.names}
        self.depth += 1
        if isinstance(node, ast.Lambda): scope.results.append(self.value(node.body, scope))
        else: self.run(node.body, scope)
        self.depth -= 1
        self.known[key] = join(*scope.results)
        return self.known[key]

    # --- statements

    def run(self, body, scope):
        for node in body:
            getattr(self, "run_" + type(node).__name__, self.run_other)(node, scope)

    def run_other(self, node, scope):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr): self.value(child, scope)

    def put(self, target, value, scope):
        "Into the container that `a`, `a.b` or `a[b]` stands for"
        while isinstance(target, (ast.Subscript, ast.Attribute)):
            key = getattr(target, "attr", None) or getattr(target.slice, "value", None)
            known = isinstance(key, (str, int))
            target, value = target.value, Parts.of({key if known else None: value}, True)
        if isinstance(target, ast.Name) and is_measured(value): scope.add(target.id, value)

    def bind(self, target, value, scope):
        if isinstance(target, ast.Name): scope.set(target.id, value)
        elif isinstance(target, ast.Starred): self.bind(target.value, some(value), scope)
        elif isinstance(target, (ast.Subscript, ast.Attribute)): self.put(target, value, scope)
        else:
            known = not any(isinstance(t, ast.Starred) for t in target.elts)
            for i, t in enumerate(target.elts):
                self.bind(t, element(value, i) if known else iterated(value), scope)

    def run_Assign(self, node, scope):
        value = self.value(node.value, scope)
        for target in node.targets: self.bind(target, value, scope)

    def run_AnnAssign(self, node, scope):
        if node.value: self.bind(node.target, self.value(node.value, scope), scope)

    def run_AugAssign(self, node, scope):
        value = self.value(node.value, scope)
        if isinstance(node.target, ast.Name): scope.add(node.target.id, value)
        else: self.put(node.target, value, scope)

    def branches(self, scope, *bodies):
        before, after = scope.names, []
        for body in bodies:
            scope.names = dict(before)
            self.run(body, scope)
            after.append(scope.names)
        names = dict.fromkeys(name for branch in after for name in branch)
        scope.names = {name: join(*(b.get(name, False) for b in after)) for name in names}

    def run_If(self, node, scope):
        if is_measured(self.value(node.test, scope)) and any(map(can_fail, ast.walk(node))):
            self.report(node.test)
        self.branches(scope, node.body, node.orelse)

    def run_For(self, node, scope):
        value = iterated(self.value(node.iter, scope))
        for _ in range(2):  # what the first round measures, the second one may use
            self.bind(node.target, value, scope)
            self.branches(scope, node.body, [])
        self.run(node.orelse, scope)

    def run_While(self, node, scope):
        for _ in range(2): self.run_If(node, scope)

    def run_With(self, node, scope):
        for item in node.items:
            value = self.value(item.context_expr, scope)
            if item.optional_vars: self.bind(item.optional_vars, value, scope)
        self.run(node.body, scope)

    def run_Try(self, node, scope):
        handlers = ([*node.body, *handler.body] for handler in node.handlers)
        self.branches(scope, [*node.body, *node.orelse], *handlers)
        self.run(node.finalbody, scope)

    def run_FunctionDef(self, node, scope): scope.set(node.name, Function(node, scope))
    def run_ClassDef(self, node, scope): self.run(node.body, Scope(scope))

    def run_Global(self, node, scope): scope.outer |= set(node.names)
    run_Nonlocal = run_Global

    def run_Return(self, node, scope):
        scope.results.append(node.value is not None and self.value(node.value, scope))

    def run_Import(self, node, scope):
        for alias in node.names: scope.set(alias.asname or alias.name, Module(alias.name))

    def run_ImportFrom(self, node, scope):
        for alias in node.names:
            value = Function() if alias.name in CLOCKS.get(node.module, ()) else False
            if (node.module or "").startswith("paligemma_nb."):
                value = package_module(node.module).get(alias.name)
            scope.set(alias.asname or alias.name, value)

    # --- verdicts

    def report(self, node): self.found[node.lineno] = ast.unparse(node)

    def run_Assert(self, node, scope):
        if is_measured(self.value(node.test, scope)): self.report(node)

    def check_call(self, node, values):
        name = ast.unparse(node.func).split(".")[-1]
        checks = name.startswith(("assert_", "test_"))
        if checks and any(map(is_measured, values)): self.report(node)
        for keyword in node.keywords:
            limit = getattr(keyword.value, "value", None)
            if keyword.arg in ("timeout", "deadline") and isinstance(limit, (int, float)):
                if limit < SHORTEST: self.report(node)


def can_fail(node):
    if isinstance(node, (ast.Raise, ast.Assert)): return True
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.fail", "sys.exit")


MODULES = {}


def package_module(name):
    "The names of a module of the package; nothing is measured where nothing asks a clock"
    if name not in MODULES:
        MODULES[name] = Scope()
        path = PACKAGE/f"{name.split('.')[1]}.py"
        text = path.read_text() if path.exists() else ""
        if "import time" in text: Interpreter().run(ast.parse(text).body, MODULES[name])
    return MODULES[name]


def clock_verdicts(source: str) -> list[str]:
    "A program's asserts that depend on a measured time, and its calls with a short time limit"
    tree, interpreter, scope = ast.parse(source), Interpreter(), Scope()
    interpreter.run(tree.body, scope)
    for node in ast.walk(tree):  # tests, and what else this file does not call
        if isinstance(node, ast.FunctionDef):
            fixtures = {p.arg: scope.get(p.arg) for p in node.args.args}  # of the same name
            values = {name: interpreter.call(f, [], {}, f.node)
                      for name, f in fixtures.items() if is_defined(f)}
            interpreter.call(Function(node, scope), [], values, node)
    return [text for _, text in sorted(interpreter.found.items())]
