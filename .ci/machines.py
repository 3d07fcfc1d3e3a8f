"""Run the notebooks and the fast tests as other machines would: `python .ci/machines.py --out FOLDER [--only NAME]... [files]`.

`make test` covers this processor's own instructions with one thread. A line for each setting says what failed; the logs lie in FOLDER."""
import argparse, ast, os, re, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
# what PyTorch's own loops and the matrix libraries of PyTorch and NumPy may use of the processor
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2", "OPENBLAS_CORETYPE": "Haswell"}
OLD = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Prescott"}
SETTINGS = {  # name -> threads, environment, whether the notebooks draw other seeds
    "own-2threads": (2, {}, False),
    "avx2-1thread": (1, AVX2, False),
    "default-1thread": (1, OLD, False),
    "default-2threads": (2, OLD, False),
    "float32-1thread": (1, {"TREELORA_PRECISION": "no"}, False),
    "other-seed": (1, {}, True),  # notebooks only: a test's seed is part of the test
}
SHIFT = 100  # is added to each seed, unless --shift says otherwise
EXEMPT = "# this seed:"  # a cell with this comment, and the reason after it, keeps its seeds
COMMON = {"MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false"}


def seed_nodes(tree: ast.AST):
    "The expressions that are seeds: `seed=...`, as an argument or a default, and what `manual_seed` and `default_rng` are given."
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            yield from (k.value for k in node.keywords if k.arg == "seed")
            if name in ("manual_seed", "default_rng"): yield from node.args[:1]
        if isinstance(node, ast.FunctionDef):
            named = node.args.posonlyargs + node.args.args
            with_default = zip(named[::-1], node.args.defaults[::-1])
            yield from (value for a, value in [*with_default, *zip(node.args.kwonlyargs, node.args.kw_defaults)] if a.arg == "seed" and value)


def seed_loops(tree: ast.AST, shift: int):
    "What a loop over `seed` counts, `range(n)` or `enumerate(xs)`, and how it counts from a shift on."
    for node in ast.walk(tree):
        if not isinstance(node, (ast.For, ast.comprehension)) or not isinstance(node.iter, ast.Call) or len(node.iter.args) != 1: continue
        target, counter = node.target, getattr(node.iter.func, "id", "")
        if counter == "range" and getattr(target, "id", "") == "seed": yield node.iter.args[0], f"{shift}, {shift} + %s"
        if counter == "enumerate" and getattr(getattr(target, "elts", [target])[0], "id", "") == "seed": yield node.iter.args[0], f"%s, {shift}"


def other_seeds(source: str, shift: int = SHIFT) -> str:
    "A cell with `shift` added to each seed that is written down in it; a seed that comes from a name or a key `seed` was counted there."
    if EXEMPT in source or re.search(r"^#\| *(export|exporti|exports|eval: *false)\b", source, re.M): return source
    tree, lines = ast.parse(source), source.encode().splitlines(keepends=True)
    found = [*((node, f"{shift} + %s") for node in seed_nodes(tree)), *seed_loops(tree, shift)]
    edits = {(n.lineno - 1, n.col_offset, n.end_lineno - 1, n.end_col_offset, form % text)
             for n, form in found if "seed" not in (text := ast.get_source_segment(source, n))}
    for first, start, last, end, text in sorted(edits, reverse=True):
        lines[first:last + 1] = [lines[first][:start] + text.encode() + lines[last][end:]]
    return b"".join(lines).decode()


def reseeded(root: Path, into: Path, shift: int) -> None:
    "A copy of the notebooks with other seeds; all else is linked, so that paths to results and settings lead where they did."
    shutil.copytree(root / "nbs", into / "nbs", ignore=shutil.ignore_patterns(".*"))
    for path in root.iterdir():
        if path.name not in ("nbs", ".git"): (into / path.name).symlink_to(path)
    for path in (into / "nbs").rglob("*.ipynb"):
        nb = nbformat.read(path, 4)
        for cell in nb.cells:
            if cell.cell_type == "code": cell.source = other_seeds(cell.source, shift)
        nbformat.write(nb, path)


def logged(command: list, log: Path, **options) -> str:
    "Run a command, its output in a file; an empty string when it passed, else the output."
    with log.open("w") as out: done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, **options)
    return "" if done.returncode == 0 else log.read_text(errors="replace") or "no output"


def failing(output: str, pattern: str, what: str) -> list[str]:
    "What the output of a failed command names as failed, or the command when it names nothing."
    return list(dict.fromkeys(re.findall(pattern, output, re.M))) or [what] if output else []


def notebooks(folder: Path, paths: list[str], env: dict, workers: int, log: Path) -> list[str]:
    "The notebooks that fail, of all or of those given, one after the other."
    command = [str(Path(sys.executable).with_name("nbdev_test")), "--do_print", "--timing"]
    if not paths: return failing(logged([*command, "--n_workers", str(workers)], log, cwd=folder, env=env), r"^\t(\S+)$", "nbdev_test")
    runs = {path: [*command, "--n_workers", "0", "--path", path] for path in paths}
    return [path for path, run in runs.items() if logged(run, log.with_name(f"{log.stem}-{Path(path).stem}.txt"), cwd=folder, env=env)]


def tests(paths: list[str], env: dict, workers: int, log: Path) -> list[str]:
    "The tests that fail."
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "--dist", "loadfile", "-m", "not slow", *(paths or ["tests"])]
    return failing(logged(command, log, cwd=ROOT, env=env), r"^(?:FAILED|ERROR) (\S+)", "pytest")


def check(name: str, files: list[str], out: Path, shift: int, cores: int) -> list[str]:
    "What fails under one setting, of all files or of those given."
    threads, more, reseed = SETTINGS[name]
    workers = max(1, cores // threads)
    env = os.environ | COMMON | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)} | more
    books, scripts = ([f for f in files if f.endswith(end)] for end in (".ipynb", ".py"))
    failed = []
    with tempfile.TemporaryDirectory() as copy:
        if reseed: reseeded(ROOT, Path(copy), shift)
        if books or not files: failed += notebooks(Path(copy) if reseed else ROOT, books, env, workers, out / f"{name}-notebooks.txt")
    if not reseed and (scripts or not files): failed += tests(scripts, env, workers, out / f"{name}-tests.txt")
    return failed


def main(argv: list[str] | None = None) -> int:
    "Each setting in turn, to the end; 1 when something failed."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="notebooks and test files; all without them")
    parser.add_argument("--only", action="append", choices=SETTINGS, help="a setting to run, as often as wanted; all without it")
    parser.add_argument("--out", type=Path, default=Path("_machines"), help="folder for the logs")
    parser.add_argument("--shift", type=int, default=SHIFT, help="what other-seed adds to each seed")
    parser.add_argument("--cores", type=int, default=2, help="how many cores to keep busy")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    bad = False
    for name in args.only or SETTINGS:
        start, failed = time.monotonic(), check(name, args.files, args.out.resolve(), args.shift, args.cores)
        bad |= bool(failed)
        print(f"{name:18} {time.monotonic() - start:5.0f} s  {'failed: ' + ' '.join(failed) if failed else 'passed'}", flush=True)
    return int(bad)


if __name__ == "__main__": sys.exit(main())
