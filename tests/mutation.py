"""Mutation testing: small changes to what computes, and whether a test notices each.

    python tests/mutation.py                        every module of mutation.yaml, or what is left of a run
    python tests/mutation.py solvers layers         some modules
    python tests/mutation.py solvers --survivors    tries those again that went unnoticed, after a test was written
    python tests/mutation.py --report               shares and survivors of what has run

cosmic-ray makes the changes and keeps their results; `build/mutation/` holds its sessions, which its own `cr-report`
and `cr-html` read too. Only how a change is tried is ours, since starting Python with torch anew takes longer than the
tests: a process that has collected the tests forks for each change, the fork puts the changed code into the function
(no file is written) and runs the tests that call it, the quick ones first, to the first failure. Constants, defaults
and decorators are changed in a fork that has not imported dit_hub yet.
"""

import argparse
import ast
import contextlib
import gc
import hashlib
import importlib
import importlib.machinery
import inspect
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import yaml

# cosmic-ray is no dependency of the project.
# pyright: reportMissingImports=false

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "mutation"

# Before torch is imported: threads do not survive a fork, and the tests are too small to want them.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_XET": "1"}
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

_PYTEST = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={ROOT}"]
_MEMORY = 12 * 2**30
_WAIT = 0.005
_NOT_RUN = 99  # the status of a fork in which something else than a test failed


@dataclass(frozen=True)
class Module:
    """A file whose changes tests should notice.

    Args:
        name: as on the command line.
        path: of the file, from the repository's root.
        tests: files of tests or single ones, from the same.
        but: words in the names of tests among them that are left out, being slow.
        cached: whether its functions keep what they return, so that all tests are run, not the callers alone.
        operators: cosmic-ray's, by name without "core/".
    """

    name: str
    path: str
    tests: tuple[str, ...]
    but: tuple[str, ...]
    cached: bool
    operators: frozenset[str]

    @property
    def file(self) -> Path:
        return ROOT / self.path

    @property
    def options(self) -> list[str]:
        """pytest's."""
        return ["-k", f"not ({' or '.join(self.but)})"] if self.but else []

    @property
    def key(self) -> str:
        """Of a session: results of another text do not count."""
        return f"{self.name}-{hashlib.sha256(self.file.read_bytes()).hexdigest()[:10]}"

    @property
    def session(self) -> Path:
        return RESULTS / f"{self.key}.sqlite"


def modules() -> dict[str, Module]:
    """By name, from mutation.yaml."""
    settings = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    operators = frozenset(settings["operators"])
    return {
        name: Module(
            name,
            fields["path"],
            tuple(f"tests/{test}" for test in fields["tests"]),
            tuple(fields.get("but", ())),
            fields.get("cached", False),
            operators,
        )
        for name, fields in settings["modules"].items()
    }


# --- The changes -----------------------------------------------------------------------------------------------------


def prepare(module: Module) -> Any:
    """The session of a module: cosmic-ray's work items, less those that change no computing."""
    from cosmic_ray.commands.init import init
    from cosmic_ray.work_db import WorkDB, use_db

    RESULTS.mkdir(parents=True, exist_ok=True)
    database: Any = WorkDB(module.session, WorkDB.Mode.create)
    if database.num_work_items:
        return database
    building = module.session.with_suffix(".part")
    building.unlink(missing_ok=True)
    with use_db(building) as fresh:
        init([module.file], fresh, {})
        _leave_out(module, fresh)
    database.close()
    building.replace(module.session)
    return WorkDB(module.session, WorkDB.Mode.open)


def _leave_out(module: Module, database: Any) -> None:
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    quiet = _quiet_places(ast.parse(module.file.read_text()))
    left_out = []
    for item in database.work_items:
        (mutation,) = item.mutations
        told = any(start <= mutation.start_pos < end for start, end in quiet)
        if told or mutation.operator_name.partition("/")[2] not in module.operators:
            left_out.append(item.job_id)
    database.set_multiple_results(left_out, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))


def _quiet_places(tree: ast.AST) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where nothing is computed: what errors say, logs and annotations."""
    nodes: list[Any] = []
    for node in ast.walk(tree):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Raise) or called.startswith(("logger.", "warnings.")):
            nodes.append(node)
        elif isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation:
            nodes.append(node.annotation)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns:
            nodes.append(node.returns)
    return [((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)) for node in nodes]


def changed_text(module: Module, mutation: Any) -> str | None:
    """The text of a module with one change; None where Python cannot read it or reads the same."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    text = module.file.read_text()
    changed = mutate_code(text, get_operator(mutation.operator_name)(), mutation.occurrence)
    try:
        same = changed is None or ast.dump(ast.parse(changed)) == ast.dump(ast.parse(text))
        compile(changed or "", module.path, "exec", dont_inherit=True)
    except SyntaxError:
        return None
    return None if same else changed


# --- The tests -------------------------------------------------------------------------------------------------------


@dataclass
class Coverage:
    """What the tests of a module do with it, unchanged.

    Args:
        seconds: processor time of each test.
        callers: tests by the first line of the function that they call.
        imports: modules of other packages that they import.
    """

    seconds: dict[str, float]
    callers: dict[str, list[str]]
    imports: list[str]

    def tests(self, first_line: int | None) -> list[str]:
        """Those of a function, the quick ones first; all for what lies outside of functions."""
        if first_line is None:
            chosen = set(self.seconds)
        else:
            chosen = set(self.callers.get(str(first_line), []))
        return sorted(chosen & set(self.seconds), key=lambda test: self.seconds[test])


class _Watch:
    """A plugin of pytest that notes which test calls which function of a file."""

    def __init__(self, file: Path):
        self.file, self.test, self.shared = file, "", ""
        self.seconds: dict[str, float] = {}
        self.called: dict[str, set[int]] = defaultdict(set)
        self.is_file: dict[str, bool] = {}

    def note(self, frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and (self.is_file.get(name) or self._is_new_and_file(name)):
            self.called[self.shared or self.test].add(frame.f_code.co_firstlineno)

    def _is_new_and_file(self, name: str) -> bool:
        if name not in self.is_file:
            self.is_file[name] = os.path.exists(name) and os.path.samefile(name, self.file)
        return self.is_file[name]

    def pytest_runtest_protocol(self, item: Any) -> None:
        self.test, self.started = item.nodeid, time.process_time()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] = time.process_time() - self.started

    def pytest_fixture_setup(self, fixturedef: Any) -> None:
        if fixturedef.scope != "function":  # made once, for all the tests of a file
            self.shared = self.test.partition("::")[0]

    def pytest_fixture_post_finalizer(self) -> None:
        self.shared = ""

    def pytest_runtest_call(self) -> None:
        self.shared = ""

    def coverage(self) -> dict[str, Any]:
        callers: dict[str, list[str]] = defaultdict(list)
        for caller, lines in self.called.items():
            tests = [caller] if "::" in caller else [test for test in self.seconds if test.startswith(f"{caller}::")]
            for line in lines:
                callers[str(line)] += tests
        ours = ("dit_hub", "conftest", "tests", "test_", "command_line", "local_hub", "__main__")
        imports = sorted(name for name in sys.modules if not name.startswith(ours))
        return {"seconds": self.seconds, "callers": callers, "imports": imports}


def watch(module: Module) -> Coverage:
    """Run the tests of a module as it is."""
    texts = repr(module).encode() + b"".join((ROOT / test.partition("::")[0]).read_bytes() for test in module.tests)
    path = RESULTS / f"{module.key}-{hashlib.sha256(texts).hexdigest()[:10]}.json"
    if not path.exists():
        watcher = _Watch(module.file)

        def run() -> int:
            import pytest

            threading.setprofile(watcher.note)
            sys.setprofile(watcher.note)
            status = pytest.main([*_PYTEST, "--tb=short", *module.options, *module.tests], plugins=[watcher])
            sys.setprofile(None)
            if status == 0:
                path.write_text(json.dumps(watcher.coverage()))
            return int(status)

        status, output = in_a_fork(run, 1800)
        if status:
            raise SystemExit(f"The tests of {module.name} fail as it is (status {status}):\n{output[-3000:]}")
    return Coverage(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Place:
    """Where a change is: the first line of the outermost and of the innermost function whose body it is in, if any."""

    outermost: int | None
    innermost: int | None
    within: bool


def place(tree: ast.AST, position: tuple[int, int]) -> Place:
    """Where a position is; a function's decorators and defaults are its own, but not within it."""
    around, within = [], False
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if first <= position[0] <= (node.end_lineno or 0):
                around.append(first)
                if len(around) == 1:  # ast.walk comes from outside
                    within = (node.body[0].lineno, node.body[0].col_offset) <= position
    return Place(around[0], around[-1], within) if around else Place(None, None, False)


# --- Running ---------------------------------------------------------------------------------------------------------


def in_a_fork(run: Callable[[], int], seconds: float) -> tuple[int, str]:
    """Status and output of a function in a process of its own, which ends after so much processor time.

    A signal that ended it is a negative status.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = os.fork()
        if child == 0:
            status = _NOT_RUN
            try:
                os.setsid()
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
                resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
                status = run()
            except BaseException as error:
                print(repr(error))
            finally:
                sys.stdout.flush()
                os._exit(status)
        waits = (60 + 40 * seconds) / _WAIT  # for one that sleeps; counted, so that a run may be stopped for a while
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if (waits := waits - 1) < 0:
                os.killpg(child, signal.SIGKILL)
            time.sleep(_WAIT)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


def _limit(seconds: float) -> float:
    """On the processor time of tests that take so much as they are."""
    return 10 + 4 * seconds


def import_changed(file: Path, text: str) -> None:
    """Have the next import of a file read another text."""
    loader: Any = importlib.machinery.SourceFileLoader
    as_is = loader.get_code

    def get_code(self: Any, fullname: str) -> Any:
        if os.path.samefile(self.path, file):
            return compile(text, self.path, "exec", dont_inherit=True)
        return as_is(self, fullname)

    loader.get_code = get_code


def functions(file: Path) -> dict[int, list[Any]]:
    """Of a module that is imported, by their first line."""
    found: dict[int, list[Any]] = defaultdict(list)
    gc.unfreeze()  # what is frozen is not listed
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType):
            name = thing.__code__.co_filename
            if os.path.basename(name) == file.name and os.path.exists(name) and os.path.samefile(name, file):
                found[thing.__code__.co_firstlineno].append(thing)
    return found


def _code_at(code: Any, line: int) -> Any:
    """The code of the function that begins at a line, among those of a module and its classes."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_firstlineno == line and inner.co_flags & inspect.CO_OPTIMIZED:
                return inner
            if (found := _code_at(inner, line)) is not None:
                return found
    return None


class Trial:
    """The changes of a module, tried."""

    def __init__(self, module: Module, database: Any, coverage: Coverage):
        self.module, self.database, self.coverage = module, database, coverage
        self.tree = ast.parse(module.file.read_text())
        self.folder = tempfile.mkdtemp(prefix="mutation-")
        self.options = [*_PYTEST, f"--basetemp={self.folder}/pytest"]
        self.inside: list[Any] = []

    def run(self, items: list[Any]) -> None:
        """Outside of functions first, as long as nothing of dit_hub is imported."""
        import pytest

        for item in sorted(items, key=lambda item: item.mutations[0].start_pos):
            if place(self.tree, item.mutations[0].start_pos).within:
                self.inside.append(item)
            else:
                self._try(item, self._imported_anew)
        if self.inside:
            pytest.main([*self.options, "-s", *self.module.options, *self.module.tests], plugins=[self])
        shutil.rmtree(self.folder, ignore_errors=True)

    def pytest_runtestloop(self, session: Any) -> bool:
        """In pytest's place: with the tests collected, try the changes within functions."""
        live = functions(self.module.file)
        gc.freeze()
        by_name = {item.nodeid: item for item in session.items}
        for item in self.inside:

            def run(text: str, tests: list[str], item: Any = item) -> int:
                from _pytest.main import pytest_runtestloop

                first = place(self.tree, item.mutations[0].start_pos).outermost
                assert first is not None
                code = _code_at(compile(text, self.module.path, "exec", dont_inherit=True), first)
                assert live[first], f"the function of line {first} was not found"
                for function in live[first]:
                    function.__code__ = code.replace(co_filename=function.__code__.co_filename)
                session.items = [by_name[test] for test in tests]
                with contextlib.suppress(session.Failed):
                    pytest_runtestloop(session)
                return int(session.testsfailed > 0)

            self._try(item, run)
        return True

    def _imported_anew(self, text: str, tests: list[str]) -> int:
        import pytest

        import_changed(self.module.file, text)
        return int(pytest.main([*self.options, *tests]))

    def _try(self, item: Any, run: Callable[[str, list[str]], int]) -> None:
        """Note whether a test fails with a change."""
        from cosmic_ray.mutating import _make_diff
        from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

        (mutation,) = item.mutations
        text = changed_text(self.module, mutation)
        if text is None:
            self.database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
            return
        function = None if self.module.cached else place(self.tree, mutation.start_pos).innermost
        tests = self.coverage.tests(function)
        seconds = sum(self.coverage.seconds[test] for test in tests)
        status, output = in_a_fork(lambda: run(text, tests), _limit(seconds)) if tests else (0, "no test calls it")
        if status == _NOT_RUN:
            raise SystemExit(f"{_told(mutation, '')} could not be tried:\n{output[-3000:]}")
        outcome = TestOutcome.KILLED if status else TestOutcome.SURVIVED
        output = "\n".join([f"status {status}", *output.splitlines()[-4:]])
        diff = "\n".join(_make_diff(self.module.file.read_text(), text, self.module.path))
        self.database.set_result(item.job_id, WorkResult(WorkerOutcome.NORMAL, output, outcome, diff))
        if not status:
            print(_told(mutation, diff), flush=True)


def try_all(module: Module, survivors: bool) -> None:
    """Try the changes of a module that have no result yet, and survivors where asked for."""
    from cosmic_ray.work_item import TestOutcome

    database = prepare(module)
    items = list(database.pending_work_items)
    if survivors:
        items += [item for item, result in database.completed_work_items if result.test_outcome == TestOutcome.SURVIVED]
    if not items:
        return
    started = time.monotonic()
    coverage = watch(module)
    for name in coverage.imports:  # what every fork would import
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    Trial(module, database, coverage).run(items)
    spent = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 60
    print(f"{module.name}: {len(items)} changes tried in {(time.monotonic() - started) / 60:.1f} minutes, "
          f"{spent:.1f} of them on the processor", flush=True)  # fmt: skip


# --- The report ------------------------------------------------------------------------------------------------------


def _told(mutation: Any, diff: str) -> str:
    lines = [line for line in diff.splitlines() if line[:1] in "+-" and not line.startswith(("---", "+++"))]
    place = f"{mutation.module_path.name}:{mutation.start_pos[0]} {mutation.definition_name or ''}"
    return "\n    ".join([f"{place} {mutation.operator_name.partition('/')[2]}", *lines])


def report(chosen: list[Module], survivors: bool) -> Iterator[str]:
    """A table, and where asked for what went unnoticed."""
    from cosmic_ray.work_db import WorkDB
    from cosmic_ray.work_item import TestOutcome

    yield "| module | mutants | killed | survived | share |\n|---|---:|---:|---:|---:|"
    details = []
    for module in chosen:
        if not module.session.exists():
            yield f"| {module.name} | not run | | | |"
            continue
        database: Any = WorkDB(module.session, WorkDB.Mode.open)
        results = database.completed_work_items
        counts = Counter(result.test_outcome for _, result in results)
        killed, survived = counts[TestOutcome.KILLED], counts[TestOutcome.SURVIVED]
        left = f" ({len(database.pending_work_items)} left)" if database.pending_work_items else ""
        share = killed / max(killed + survived, 1)
        yield f"| {module.name}{left} | {killed + survived} | {killed} | {survived} | {share:.1%} |"
        alive = [(item.mutations[0], result) for item, result in results if result.test_outcome == TestOutcome.SURVIVED]
        details += [_told(mutation, result.diff) for mutation, result in sorted(alive, key=lambda m: m[0].start_pos)]
    if survivors:
        yield from details


def main() -> None:
    """Be the command line."""
    known = modules()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="module", help=f"of: {', '.join(known)}")
    parser.add_argument("--survivors", action="store_true", help="try those that went unnoticed again; report: show")
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if unknown := set(arguments.modules) - set(known):
        parser.error(f"no module {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    chosen = [known[name] for name in arguments.modules or known]
    os.chdir(ROOT)
    if not arguments.report:
        for module in chosen:
            if (child := os.fork()) == 0:
                try_all(module, arguments.survivors)
                os._exit(0)
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                raise SystemExit(f"{module.name} could not be tried.")
    for line in report(chosen, arguments.survivors and arguments.report):
        print(line)


if __name__ == "__main__":
    main()
